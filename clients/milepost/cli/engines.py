"""`milepost engines`: the fleet as the router sees it; drain or remove one engine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from milepost.cli import tables
from milepost.cli.options import PATIENCE, add_address, add_json, add_run, address
from milepost.client.router import RouterClient
from milepost.types import Engine, EngineState


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "engines", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "action", nargs="?", default="list", choices=("list", "drain", "remove"), help="default: list"
    )
    parser.add_argument(
        "engine_id", nargs="?", default="", metavar="ID", help="the engine to drain or remove"
    )
    add_run(parser)
    add_address(parser, "router")
    parser.add_argument(
        "--max-wait-s",
        type=float,
        default=60.0,
        metavar="S",
        help="for requests in flight (default: %(default)s)",
    )
    add_json(parser)
    parser.set_defaults(run=engines, usage_error=parser.error, run_id="")


_DESCRIPTION = """Lists the engines (with --run those of a run); `drain ID` sends one no new
requests and waits for those in flight, `remove ID` forgets it.

exit status: 0 done; 1 requests were still in flight, no such engine, or the router cannot be asked;
2 usage
"""


async def engines(options: argparse.Namespace) -> int:
    """Runs the subcommand."""
    if options.action != "list" and not options.engine_id:
        options.usage_error(f"{options.action}: name the engine (see `milepost engines`)")
    async with RouterClient(address(options, "router"), retry=PATIENCE) as client:
        if options.action == "drain":
            return _drained(
                await client.drain_engine(options.engine_id, max_wait_s=options.max_wait_s), options
            )
        if options.action == "remove":
            return _removed(removed=await client.remove_engine(options.engine_id), options=options)
        fleet = await client.list_engines(options.run_id)
    print(tables.as_json(fleet) if options.json else engines_text(fleet.engines))
    return 0


def _drained(in_flight: int, options: argparse.Namespace) -> int:
    if in_flight:
        after = f"after {options.max_wait_s:g} s"
        print(f"{options.engine_id} is draining: {in_flight} requests are still in flight {after}")
        return 1
    print(f"{options.engine_id} is drained")
    return 0


def _removed(*, removed: bool, options: argparse.Namespace) -> int:
    print(
        f"{options.engine_id} is removed" if removed else f"{options.engine_id}: the router does not know it"
    )
    return 0 if removed else 1


def engines_text(fleet: Sequence[Engine]) -> str:
    """Engines as a table."""
    if not fleet:
        return "no engines"
    head = (
        "engine",
        "state",
        "version",
        "label",
        "in flight",
        "requests",
        "failures",
        "seen",
        "url",
        "remarks",
    )
    return tables.table(head, [_row(e) for e in fleet])


def _row(e: Engine) -> tuple[object, ...]:
    serving = e.state is EngineState.SERVING
    return (
        e.engine_id,
        e.state.name.lower(),
        e.weight_version if serving else "-",
        e.weight_label if serving else "-",
        e.in_flight,
        e.requests_total,
        e.failures_total,
        f"{e.last_seen_ago_s:.1f} s",
        e.url,
        e.detail,
    )
