"""For all tests: services serve no metrics unless a test asks for them, so that no two take one port."""

from __future__ import annotations

import os

for service in ("BUFFER", "ROUTER", "ROLLOUT", "TRAINER", "ENGINE"):
    os.environ.setdefault(f"MILEPOST_{service}__METRICS_LISTEN", "")
