"""The line by which a service says that it serves, and the addresses in it.

milepost buffer ready grpc=127.0.0.1:7101
milepost router ready grpc=127.0.0.1:7102 http=127.0.0.1:7202 metrics=127.0.0.1:9102
engine ready http://127.0.0.1:30000 model=...
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LINE = re.compile(r"^(?:milepost )?(?P<name>[a-z][a-z0-9_-]*) ready(?P<rest>(?: .*)?)$")
_PAIR = re.compile(r"(?P<key>[a-z_]+)=(?P<value>\S+)")
_URL = re.compile(r"(?:^|\s)https?://(?P<value>[^\s/]+)")
_ADDRESSES = ("grpc", "http", "metrics")


def parse_readiness(line: str) -> Mapping[str, str] | None:
    """Reads a readiness line.

    Args:
      line: one line of a service's standard output.

    Returns:
      Addresses as `host:port` by protocol (`grpc`, `http`, `metrics`), or None when it is another line.
    """
    match = _LINE.match(line.strip())
    if match is None:
        return None
    rest = match["rest"]
    addresses = {m["key"]: _host_port(m["value"]) for m in _PAIR.finditer(rest) if m["key"] in _ADDRESSES}
    bare = _URL.search(rest)
    if bare and "http" not in addresses:
        addresses["http"] = bare["value"]
    return addresses


def _host_port(value: str) -> str:
    return re.sub(r"^https?://", "", value).rstrip("/")
