"""`milepost watch`: a live view of a run in the terminal; survives any service being away."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import sys
from typing import Any

from milepost.cli.options import DEFAULTS, add_address, add_run, address
from milepost.cli.services import missing_extra
from milepost.cli.watch_model import Watcher

_FRAME_S = 0.5


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "watch", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    add_address(parser, *DEFAULTS)
    parser.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="S",
        help="between two questions (default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.set_defaults(run=watch)


_DESCRIPTION = """Shows a run as it goes: reward, loss, staleness, the queue of the ledger, the engines and
their weight versions, tokens per second. Ctrl-C ends it; the run does not notice.

exit status: 0 done; 1 with --once when no service answered; 2 wrong command line; 130 interrupted
"""


async def watch(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    try:
        console = importlib.import_module("rich.console").Console()
        live = importlib.import_module("rich.live").Live
        draw = importlib.import_module("milepost.cli.watch_view").draw
    except ModuleNotFoundError as error:
        print(
            missing_extra("cli", error.name or "rich").replace("milepost cli", "milepost watch"),
            file=sys.stderr,
        )
        return 1
    watcher = Watcher(
        options.run_id,
        addresses={s: address(options, s) for s in DEFAULTS},
        interval_s=max(0.05, options.interval),
    )
    snapshot = watcher.snapshot
    if options.once:
        await watcher.once()
        console.print(draw(snapshot))
        return 0 if snapshot.anybody_answered else 1
    asking = asyncio.create_task(watcher.run())
    try:
        with live(draw(snapshot), console=console, auto_refresh=False, screen=console.is_terminal) as view:
            while not asking.done():
                await asyncio.wait([asking], timeout=_FRAME_S)
                view.update(draw(snapshot), refresh=True)
        await asking
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    return 0
