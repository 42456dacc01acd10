"""`milepost SERVICE ARGS...` is `python -m milepost_SERVICE ARGS...` in this very process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

SERVICES = ("buffer", "router", "rollout", "trainer", "engine")


def hand_over(service: str, args: Sequence[str]) -> int:
    """Runs a service's own command line; returns its exit status."""
    sys.argv = [f"milepost {service}", *args]
    try:
        runpy.run_module(f"milepost_{service}", run_name="__main__", alter_sys=True)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0].startswith("milepost"):
            raise
        print(missing_extra(service, error.name or "?"), file=sys.stderr)
        return 1
    except SystemExit as leave:
        return _status(leave.code)
    return 0


def missing_extra(extra: str, package: str) -> str:
    """What to tell somebody who has not installed an extra."""
    return f"milepost {extra}: the package {package!r} is not installed; run: pip install 'milepost[{extra}]'"


def _status(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    print(code, file=sys.stderr)
    return 1
