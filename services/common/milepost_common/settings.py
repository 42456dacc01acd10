"""Settings of a service: defaults < TOML table < environment < flags; unknown keys are refused by name.

    class RouterSettings(ServiceSettings, table="router"):
        listen: str = "127.0.0.1:7102"

    settings = load(RouterSettings, ["--config", "milepost.toml", "--listen", "0.0.0.0:7102"])

One TOML file serves all services; each reads the table it names. The environment variable of a key is
`MILEPOST_<TABLE>__<KEY>` with `__` between levels; its flag is `--key value`, or `--outer.inner value` for a
nested one.
A class that names more tables (`tables=("run",)`) finds each under the attribute of that name. Every class
has the table `[telemetry]`, which is the same for all services, under `telemetry`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, EnvSettingsSource, PydanticBaseSettingsSource

from milepost.errors import InvalidArgument

S = TypeVar("S", bound="ServiceSettings")


class Table(BaseModel):
    """A nested table of settings: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TelemetrySettings(Table):
    """What services tell about themselves, `[telemetry]`; one table for all of them."""

    otlp_endpoint: str = Field("", pattern=r"^(https?://[^\s/]+/?)?$")
    """`http://host:port` of an OpenTelemetry collector (OTLP over gRPC). Empty: what the variable
    OTEL_EXPORTER_OTLP_ENDPOINT says, and without that nothing is exported."""
    trace_ratio: float = Field(1.0, ge=0, le=1)
    """Share of prompts that are traced, of those that come without a trace of their own."""
    log_format: Literal["text", "json"] = "text"
    """`text` for people; `json` for machines, one object a line."""


class ServiceSettings(BaseSettings):
    """Base of a service's settings. Attribute docstrings become help texts and the settings reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)  # type: ignore[assignment]

    table: ClassVar[str] = ""
    tables: ClassVar[tuple[str, ...]] = ("telemetry",)

    telemetry: TelemetrySettings = TelemetrySettings.model_validate({})
    """Traces, metrics and logs: the table `[telemetry]`."""

    def __init_subclass__(cls, *, table: str = "", tables: tuple[str, ...] = (), **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.table = table or cls.table
        cls.tables = (*tables, *(t for t in cls.tables if t not in tables))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the caller passes; `load` puts the sources together."""
        return (init_settings,)


def load(kind: type[S], argv: Sequence[str] | None = None, *, environ: Mapping[str, str] | None = None) -> S:
    """Reads settings from the file named by `--config`, the environment and flags.

    Raises:
      InvalidArgument: names the key, its value, where it came from and the remedy.
    """
    merged: dict[str, Any] = {}
    for _, layer in layers(kind, argv, environ=environ):
        _merge(merged, layer)
    try:
        return kind(**merged)
    except ValidationError as error:
        raise InvalidArgument(explain(kind, error), reason="BAD_SETTING") from error


def layers(
    kind: type[ServiceSettings],
    argv: Sequence[str] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """What each source says, before it is validated, from the weakest to the strongest: `(name, values)`."""
    args = list(sys.argv[1:] if argv is None else argv)
    config, rest = _take_config(args)
    environment = os.environ if environ is None else environ
    return [
        ("file", _from_file(kind, config)),
        ("environment", _from_environment(kind, environment)),
        ("flag", _from_flags(kind, rest)),
    ]


def load_telemetry(*, environ: Mapping[str, str] | None = None) -> TelemetrySettings:
    """`[telemetry]` as the environment alone has it, for commands that read no file.

    Raises:
      InvalidArgument: as `load`.
    """
    environment = os.environ if environ is None else environ
    try:
        return TelemetrySettings(**_read_environment(TelemetrySettings, "MILEPOST_TELEMETRY__", environment))
    except ValidationError as error:
        raise InvalidArgument(explain(TelemetrySettings, error), reason="BAD_SETTING") from error


def load_or_exit(kind: type[S], argv: Sequence[str] | None = None) -> S:
    """`load` for command lines: prints the error and exits with status 2."""
    try:
        return load(kind, argv)
    except InvalidArgument as error:
        print(f"milepost: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """One line for each wrong key: name, value, what is wrong, what to do."""
    lines: list[str] = []
    for item in error.errors():
        path = [str(p) for p in item["loc"]]
        name = ".".join(
            path if _is_table(kind, path) else [getattr(kind, "table", "") or kind.__name__, *path]
        )
        if item["type"] == "extra_forbidden":
            known = _known_keys(kind, path[:-1])
            lines.append(f"unknown setting {name} = {item['input']!r}; {nearest(path[-1], known)}")
        elif item["type"] == "missing":
            lines.append(f"setting {name} is missing; give it in the TOML file, the environment or as a flag")
        else:
            lines.append(f"setting {name} = {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def _is_table(kind: type[BaseModel], path: Sequence[str]) -> bool:
    """True where the path starts with a table of its own, as in `run.groups_per_step`."""
    return bool(path) and path[0] in getattr(kind, "tables", ())


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean ...?`, or the list of what is known."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


# ---------------------------------------------------------------------------------------------- sources


def _take_config(args: list[str]) -> tuple[str, list[str]]:
    for i, arg in enumerate(args):
        if arg == "--config":
            if i + 1 == len(args):
                raise InvalidArgument("--config needs the path of a TOML file after it", reason="BAD_SETTING")
            return args[i + 1], args[:i] + args[i + 2 :]
        if arg.startswith("--config="):
            return arg.removeprefix("--config="), args[:i] + args[i + 1 :]
    return "", args


def _from_file(kind: type[ServiceSettings], path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"--config {path}: {error.strerror}; give the path of a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"--config {path}: not TOML: {error}") from error
    unknown = sorted(set(content) - set(TABLES))
    if unknown:
        hint = nearest(unknown[0], TABLES)
        raise InvalidArgument(f"--config {path}: unknown table [{unknown[0]}]; {hint}", reason="BAD_SETTING")
    own = dict(content.get(kind.table, {}))
    return own | {name: content[name] for name in kind.tables if name in content}


TABLES = ("run", "buffer", "router", "rollout", "trainer", "engine", "up", "telemetry")


def _from_environment(kind: type[ServiceSettings], environ: Mapping[str, str]) -> dict[str, Any]:
    _check_tables(environ)
    merged: dict[str, Any] = {}
    _merge(merged, _read_environment(kind, f"MILEPOST_{kind.table.upper()}__", environ))
    for name in kind.tables:
        nested = _nested_model(kind, name)
        values = _read_environment(nested, f"MILEPOST_{name.upper()}__", environ) if nested else {}
        if values:
            _merge(merged, {name: values})
    return merged


def _check_tables(environ: Mapping[str, str]) -> None:
    """Refuses a variable of a table that nobody has: it would be passed over by every service."""
    for key in environ:
        match = re.match(r"MILEPOST_([A-Z]+)__.", key.upper())
        if match and match[1].lower() not in TABLES:
            hint = nearest(match[1].lower(), TABLES)
            raise InvalidArgument(
                f"unknown setting {key} in the environment: no table {match[1].lower()}; {hint}",
                reason="BAD_SETTING",
            )


def _read_environment(kind: type[BaseModel], prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    mine = {k: v for k, v in environ.items() if k.upper().startswith(prefix)}
    for key in mine:
        name = key[len(prefix) :].lower().split("__")[0]
        if name not in kind.model_fields:
            hint = nearest(name, list(kind.model_fields))
            raise InvalidArgument(f"unknown setting {key} in the environment; {hint}", reason="BAD_SETTING")
    probe: Any = type("Probe", (_Probe, kind), {})
    source = EnvSettingsSource(probe, env_prefix=prefix, env_nested_delimiter="__", case_sensitive=False)
    source.env_vars = {k.lower(): v for k, v in mine.items()}
    return source()


class _Probe(BaseSettings):
    """Gives a plain table what EnvSettingsSource expects of its class."""

    model_config = ConfigDict(extra="forbid")  # type: ignore[assignment]


class _Parser(argparse.ArgumentParser):
    """argparse that raises our error and names the nearest flag."""

    def error(self, message: str) -> NoReturn:
        known = [o for a in self._actions for o in a.option_strings]
        word = next((w.split("=")[0] for w in message.split() if w.startswith("-")), "")
        hint = f"; {nearest(word, known)}" if "unrecognized" in message else ""
        raise InvalidArgument(f"{message}{hint}", reason="BAD_SETTING")


def _from_flags(kind: type[ServiceSettings], argv: list[str]) -> dict[str, Any]:
    parser = _Parser(prog=f"milepost {kind.table}", allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="TOML file with a table for each service")
    source = CliSettingsSource(
        kind, cli_parse_args=argv, root_parser=parser, cli_implicit_flags=True, cli_avoid_json=True
    )
    return source()


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], typing.cast(Mapping[str, Any], value))
        else:
            into[key] = dict(typing.cast(Mapping[str, Any], value)) if isinstance(value, Mapping) else value


def _nested_model(kind: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _known_keys(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    model: type[BaseModel] | None = kind
    for name in path:
        model = _nested_model(model, name) if model else None
    return list(model.model_fields) if model else []
