"""For all tests: services serve no metrics unless a test asks for them, so that no two take one port; and
Ctrl-C reaches children also where a shell started the tests in the background, which makes all ignore it."""

from __future__ import annotations

import os
import signal

for service in ("BUFFER", "ROUTER", "ROLLOUT", "TRAINER", "ENGINE"):
    os.environ.setdefault(f"MILEPOST_{service}__METRICS_LISTEN", "")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
