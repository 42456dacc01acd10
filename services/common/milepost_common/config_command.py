"""`milepost config`: what each setting is, where it comes from, and whether a file is right for all."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from milepost.errors import InvalidArgument
from milepost_common.catalogue import MODULES, Effective, as_toml, effective, settings_class
from milepost_common.settings import TABLES, load

OK, WRONG, USAGE = 0, 1, 2
_SECRET = ("key", "password", "token")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    options, rest = parser().parse_known_args(argv)
    if options.check:
        return _check(options.check)
    if rest and not options.service:
        print(f"milepost config: {rest[0]}: name the service whose flag it is", file=sys.stderr)
        return USAGE
    config = options.config or ("milepost.toml" if Path("milepost.toml").is_file() else "")
    flags = [*(("--config", config) if config else ()), *rest]
    services = [options.service] if options.service else list(MODULES)
    rows = {service: effective(settings_class(service), flags) for service in services}
    if options.json:
        print(
            json.dumps({s: [_as_json(r) for r in found] for s, found in rows.items()}, indent=1, default=str)
        )
    else:
        _print_all(rows, everything=options.all or bool(options.service))
    return _report(_problems(options.service, flags) if options.service else [])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="milepost config", description=_DESCRIPTION, epilog=_EPILOG)
    p.add_argument("service", nargs="?", choices=tuple(MODULES), metavar="SERVICE", help=", ".join(MODULES))
    p.add_argument("--config", default="", metavar="FILE", help="TOML file (default: milepost.toml)")
    p.add_argument("--check", default="", metavar="FILE", help="check a TOML file for every table in it")
    p.add_argument("--all", action="store_true", help="print defaults too")
    p.add_argument("--json", action="store_true", help="JSON instead of text")
    return p


_DESCRIPTION = "Prints the settings in force and where each comes from: default, file, environment or flag."
_EPILOG = """With a SERVICE, further flags are read as that service would, and the result is checked.
Exit status: 0 right, 1 wrong, 2 wrong command line."""


def _print_all(rows: dict[str, list[Effective]], *, everything: bool) -> None:
    for service, found in rows.items():
        shown = [r for r in found if everything or r.origin != "default"]
        hidden = len(found) - len(shown)
        print(f"[{service}]" + (f"  # {hidden} more at their defaults (--all)" if hidden else ""))
        width = max((len(r.key) for r in shown), default=0)
        for row in shown:
            value = row.value if row.origin == "default" else as_toml(_value(row))
            print(f"  {row.key:<{width}} = {value}  # {row.origin}")


def _as_json(row: Effective) -> dict[str, Any]:
    return {"key": row.key, "value": _value(row), "origin": row.origin}


def _value(row: Effective) -> Any:
    """The value, unless it is a secret that somebody set."""
    secret = (
        row.origin != "default" and row.key.endswith(_SECRET) and isinstance(row.value, str) and row.value
    )
    return "********" if secret else row.value


def _check(path: str) -> int:
    """Checks every table of a file against the service it is for."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return _report([f"{path}: {error.strerror}; give the path of a TOML file"])
    except tomllib.TOMLDecodeError as error:
        return _report([f"{path}: not TOML: {error}"])
    services = [s for s in MODULES if s in tables or (s == "trainer" and "run" in tables)]
    problems = [p for s in services or ["up"] for p in _problems(s, ["--config", path])]
    code = _report(list(dict.fromkeys(problems)))
    if code == OK:
        print(f"{path}: right ({', '.join(t for t in TABLES if t in tables) or 'empty'})")
    return code


def _problems(service: str, flags: Sequence[str]) -> list[str]:
    try:
        load(settings_class(service), flags)
    except InvalidArgument as error:
        return str(error).splitlines()
    return []


def _report(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"milepost config: {problem}", file=sys.stderr)
    return WRONG if problems else OK
