"""The command `milepost`: finds the subcommand, runs it, and turns what it raises into an exit status.

    0    done
    1    failed: the message says what and what to do
    2    the command line or a setting is wrong
    130  interrupted
    143  ended by SIGTERM

Subcommands live in one module each and are imported when they are asked for, so that a missing extra hurts
nobody else. `milepost SERVICE ...` hands the whole command line to the service's own.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from milepost import __version__
from milepost.cli.options import in_words
from milepost.cli.services import SERVICES, hand_over
from milepost.errors import InvalidArgument, MilepostError

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

COMMANDS: Mapping[str, str] = {
    "up": "start all services of a run on this machine and keep them alive",
    "feed": "put the prompts of a JSONL file into a run",
    "rollout": "roll prompts out: prompts in, scored trajectories out; no trainer needed",
    "watch": "live view of a run",
    "ledger": "the ledger of a run: rows, counts, audit",
    "engines": "list, drain or remove engines",
    "weights": "carry files of weights to hosts that share no folder with the trainer",
    "health": "ask a service whether it serves",
    "config": "effective settings, and where each comes from",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except _Terminated:
        print("milepost: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("milepost: interrupted", file=sys.stderr)
        return INTERRUPTED
    except MilepostError as error:
        print(f"milepost {args[0]}: {in_words(error)}", file=sys.stderr)
        return USAGE if isinstance(error, InvalidArgument) else FAILED
    except BrokenPipeError:
        # Whoever reads us has had enough. Python would complain once more when it closes standard output.
        sys.stderr.close()
        return FAILED
    except OSError as error:
        print(f"milepost {args[0]}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return FAILED


def _dispatch(args: list[str]) -> int:
    name = args[0] if args else ""
    if name in SERVICES and not (name == "rollout" and not _is_service_call(args[1:])):
        return hand_over(name, args[1:])
    if name == "config" or (name == "up" and not _wants_help(args[1:])):
        return _common(name)(args[1:])
    parser = _parser(name)
    options = parser.parse_args(args)
    run: Callable[[argparse.Namespace], Any] | None = getattr(options, "run", None)
    if run is None:
        parser.print_help()
        return OK if args else USAGE
    with _sigterm_interrupts():
        result = run(options)
        return asyncio.run(result) if asyncio.iscoroutine(result) else int(result)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _sigterm_interrupts() -> Generator[None]:
    """SIGTERM ends a command as Ctrl-C does: in order, and also where it is the first process of a container,
    to which a SIGTERM without a handler does nothing."""
    if threading.current_thread() is not threading.main_thread():  # Python takes handlers there alone
        yield
        return
    came: list[int] = []

    def on_sigterm(number: int, _frame: object) -> None:
        came.append(number)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: asyncio left it so
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise _Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_service_call(rest: Sequence[str]) -> bool:
    """`milepost rollout serve` is the gateway; `milepost rollout prompts.jsonl` is a client of one."""
    return bool(rest) and rest[0] == "serve"


def _wants_help(rest: Sequence[str]) -> bool:
    return bool(set(rest) & {"-h", "--help"})


def _common(name: str) -> Callable[[Sequence[str]], int]:
    """The main function of a command that lives beside the services."""
    module = importlib.import_module(f"milepost.cli.{name}")
    return module.main


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="milepost",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="RL post-training of language models as four services that live and die on their own.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"milepost {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command, text in COMMANDS.items():
        if command == name:
            importlib.import_module(f"milepost.cli.{command}").add(commands, text)
        else:
            commands.add_parser(command, help=text, add_help=False)
    return parser


_EPILOG = f"""services (each takes `serve --config milepost.toml` and a flag for every setting):
  {", ".join(SERVICES)}

exit status: 0 done, 1 failed, 2 wrong command line or setting, 130 interrupted
"""
