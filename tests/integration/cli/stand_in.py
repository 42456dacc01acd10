"""A program that stands in for a service: `stand_in.py NAME FOLDER [word ...]`.

It appends a line to `FOLDER/NAME.journal` at each event. Words: `ready` prints a readiness line with the port
it listens on (`--listen host:port` among the words is kept); `exit=N` leaves with N; `once-exit=N` does so
only the first time; `deaf` ignores SIGTERM; `child` starts a grandchild that ignores SIGTERM; `die=FILE`
leaves with 1 as soon as FILE exists, and removes it. Else it serves until SIGTERM.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> int:
    name, folder, *words = sys.argv[1:]
    journal = Path(folder) / f"{name}.journal"
    options = dict(w.split("=", 1) for w in words if "=" in w)

    def note(text: str) -> None:
        with journal.open("a") as file:
            file.write(text + "\n")

    first = not journal.exists()
    note(f"start {os.getpid()}")
    wake_r, wake_w = os.pipe()
    if "deaf" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os.write(wake_w, b"x"))
    print(f"{name} says hello", file=sys.stderr, flush=True)
    if "child" in words:
        code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()"
        note(f"grandchild {subprocess.Popen([sys.executable, '-c', code]).pid}")
    if "ready" in words:
        host, _, port = (
            words[words.index("--listen") + 1].rpartition(":") if "--listen" in words else ("", "", "0")
        )
        server = socket.create_server((host or "127.0.0.1", int(port)))
        note(f"listen {server.getsockname()[1]}")
        print(f"milepost {name} ready grpc=127.0.0.1:{server.getsockname()[1]}", flush=True)
    if "exit" in options:
        return int(options["exit"])
    if first and "once-exit" in options:
        return int(options["once-exit"])
    trigger = Path(options["die"]) if "die" in options else None
    while not select.select([wake_r], [], [], 0.02)[0]:
        if trigger and trigger.exists():
            trigger.unlink()
            return 1
    note("stop")
    return 0


if __name__ == "__main__":
    sys.exit(main())
