"""Readiness lines as services print them."""

from __future__ import annotations

import pytest

from milepost_common.up.readiness import parse_readiness


@pytest.mark.parametrize(
    ("line", "addresses"),
    [
        ("milepost buffer ready grpc=127.0.0.1:7101", {"grpc": "127.0.0.1:7101"}),
        ("milepost router ready grpc=a:1 http=b:2\n", {"grpc": "a:1", "http": "b:2"}),
        ("milepost engine ready http=http://127.0.0.1:30000 model=m", {"http": "127.0.0.1:30000"}),
        ("engine ready http://127.0.0.1:30000 model=/m dialect=0.5.21", {"http": "127.0.0.1:30000"}),
        ("engine ready http://127.0.0.1:30000/", {"http": "127.0.0.1:30000"}),
        ("milepost buffer ready grpc=a:1 metrics=b:2", {"grpc": "a:1", "metrics": "b:2"}),
        ("engine ready http://a:1 model=m metrics=b:2", {"http": "a:1", "metrics": "b:2"}),
        ("milepost trainer ready", {}),
    ],
)
def test_addresses_are_read(line: str, addresses: dict[str, str]) -> None:
    assert parse_readiness(line) == addresses


@pytest.mark.parametrize(
    "line",
    [
        "",
        "ready",
        "milepost buffer is ready grpc=a:1",
        "INFO milepost buffer ready grpc=a:1",
        "buffer readying",
    ],
)
def test_other_lines_are_not_readiness(line: str) -> None:
    assert parse_readiness(line) is None
