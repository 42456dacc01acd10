"""`milepost weights`: files of weights between hosts that share no folder (see milepost.mirror)."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from milepost.mirror import Mirror, serve_files, serve_mirror


def add(commands: Any, text: str) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "weights", help=text, description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(metavar="serve | mirror", required=True)
    serve = kinds.add_parser("serve", help="beside the trainer: serve the files that it writes")
    mirror = kinds.add_parser("mirror", help="beside engines: fetch what the trainer asks for")
    mirror.add_argument("--source", required=True, metavar="URL", help="the other side, http://host:7304")
    for kind, port, run in ((serve, 7304, _serve), (mirror, 7305, _mirror)):
        kind.add_argument("folder", type=Path, help="of weights; the same path on both sides")
        kind.add_argument(
            "--listen", default=f"127.0.0.1:{port}", metavar="HOST:PORT", help="(default: %(default)s)"
        )
        kind.set_defaults(run=run)


_DESCRIPTION = """Carries the weights of `[trainer.publish] transport = "disk"` to hosts that share no folder
with the trainer. `serve` runs beside the trainer, `mirror` beside the engines; the trainer names the
mirrors in `[trainer.publish] mirrors`. Files are verified by SHA-256.

exit status: 0 stopped by SIGTERM; 1 failed; 2 wrong command line; 130 interrupted
"""


def _serve(options: argparse.Namespace) -> int:
    return _run(serve_files(options.folder, listen=options.listen), "weights")


def _mirror(options: argparse.Namespace) -> int:
    mirror = Mirror(options.source, root=options.folder)
    return _run(serve_mirror(mirror, listen=options.listen), "mirror")


def _run(server: ThreadingHTTPServer, name: str) -> int:
    """Serves until SIGTERM."""
    logging.basicConfig(
        level="INFO", stream=sys.stderr, format=f"%(asctime)s {name} %(levelname)s %(message)s"
    )

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()  # it waits for the loop that we are in

    signal.signal(signal.SIGTERM, stop)
    with server:
        host, port = server.server_address[:2]
        print(f"milepost {name} ready http={host!s}:{port}", flush=True)
        server.serve_forever()
    return 0
