"""`milepost feed`: puts the prompts of a JSONL file into a run, resuming where it stood."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from milepost.cli.options import add_address, add_run, address
from milepost.cli.telemetry import exporting
from milepost.errors import MilepostError
from milepost.feed import Feeder, FeedOptions, FeedProgress
from milepost.linelog import LineLog

_TTY_PERIOD_S, _LOG_PERIOD_S = 0.1, 10.0


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "feed", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="JSONL: one prompt a line")
    add_run(parser)
    add_address(parser, "buffer")
    parser.add_argument(
        "--source", default="", metavar="NAME", help="name of the source (default: the file's name)"
    )
    parser.add_argument(
        "--dataset", default="", metavar="NAME", help="first part of ids (default: name without suffix)"
    )
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="how often (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="prompts a call (default: %(default)s)"
    )
    parser.add_argument("--keep-open", action="store_true", help="do not close the source at the end")
    parser.add_argument("--follow", action="store_true", help="the file grows: wait for more lines, for ever")
    parser.add_argument(
        "--wait-s", type=float, default=300.0, metavar="S", help="wait for buffer and run at the start"
    )
    parser.add_argument(
        "--retry-s", type=float, default=120.0, metavar="S", help="how long the buffer may be away"
    )
    parser.add_argument(
        "--stall-s", type=float, default=86_400.0, metavar="S", help="how long to wait for credits"
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=10.0,
        metavar="S",
        help="deadline of one call (default: %(default)s)",
    )
    parser.add_argument(
        "--acknowledged", default="", metavar="FILE", help="append accepted ids, a witness for the audit"
    )
    parser.set_defaults(run=feed)


_DESCRIPTION = """Puts the prompts of a JSONL file into a run. A line is an object with one of
"prompt" (text), "messages" and "input_ids", and optionally "prompt_id", "label", "metadata",
"reward", "sampling"; ids default to <dataset>/<epoch>/<index>. Lines that cannot be used are
reported with their number and skipped.

The position is kept in the buffer: stop it, start it again, and it goes on where it stood. It goes
only as fast as the run takes prompts.

exit status: 0 all fed; 1 lines were skipped, or it failed; 2 wrong command line; 130 interrupted
"""


async def feed(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    feed_options = FeedOptions(
        run_id=options.run_id,
        source_id=options.source,
        dataset=options.dataset,
        epochs=options.epochs,
        batch=options.batch,
        keep_open=options.keep_open,
        follow=options.follow,
        wait_s=options.wait_s,
        retry_s=options.retry_s,
        stall_s=options.stall_s,
        timeout_s=options.timeout_s,
    )
    with ExitStack() as stack:
        stack.enter_context(exporting("feed"))
        line = stack.enter_context(ProgressLine(options.file))
        witness = (
            stack.enter_context(Acknowledged(options.acknowledged, options.run_id))
            if options.acknowledged
            else None
        )
        feeder = Feeder(
            options.file,
            buffer=address(options, "buffer"),
            options=feed_options,
            on_progress=line.show,
            on_bad_line=line.bad,
            on_accepted=witness.accepted if witness else None,
        )
        done = await feeder.run()
    print(f"fed {done.accepted} prompts ({done.duplicates} were there already), {done.skipped} lines skipped")
    if not done.accepted and not done.skipped and not done.position.offset_bytes and not done.size_bytes:
        print(f"milepost feed: {options.file} is empty; write one prompt a line", file=sys.stderr)
    return 1 if done.skipped else 0


class Acknowledged(LineLog):
    """Appends accepted ids to a JSONL file, each batch flushed to the disk before the next is offered."""

    def __init__(self, path: str, run_id: str) -> None:
        super().__init__(path, synced=True)
        self._run_id = run_id

    def accepted(self, prompt_ids: Sequence[str]) -> None:
        """Writes one batch."""
        self.append({"run_id": self._run_id, "accepted": list(prompt_ids)})


class ProgressLine:
    """One line that is rewritten on a terminal; elsewhere a line now and then, and when a wait starts."""

    def __init__(self, name: str) -> None:
        self._name, self._tty = name, sys.stderr.isatty()
        self._shown_at, self._wait, self._started = 0.0, "", time.monotonic()

    def show(self, progress: FeedProgress) -> None:
        """Shows where it stands, if it is time."""
        now = time.monotonic()
        period = _TTY_PERIOD_S if self._tty else _LOG_PERIOD_S
        new_wait = progress.waiting_for != self._wait and not (
            not self._tty and "credits" in progress.waiting_for
        )
        if now - self._shown_at < period and not (new_wait and progress.waiting_for):
            return
        self._shown_at, self._wait = now, progress.waiting_for
        text = self._text(progress)
        print(
            f"\r\033[K{text}" if self._tty else text,
            end="" if self._tty else "\n",
            file=sys.stderr,
            flush=True,
        )

    def bad(self, number: int, error: MilepostError) -> None:
        """Reports a line that is skipped."""
        text = str(error)
        text = text if text.startswith(f"line {number}:") else f"line {number}: {text}"
        print(
            f"{chr(13) + chr(27) + '[K' if self._tty else ''}{self._name}: {text}; skipped",
            file=sys.stderr,
            flush=True,
        )

    def _text(self, progress: FeedProgress) -> str:
        part = progress.position.offset_bytes / progress.size_bytes if progress.size_bytes else 0.0
        rate = progress.accepted / max(1e-9, time.monotonic() - self._started)
        at = f"epoch {progress.position.epoch}, {part:4.0%}, {progress.accepted} prompts, {rate:.0f}/s"
        return f"{self._name}: {at}" + (f"; {progress.waiting_for}" if progress.waiting_for else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
