"""Named transport settings in one place: message sizes, keepalive and retries of every gRPC channel."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc.aio import Channel

from milepost.errors import InvalidArgument

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(\d{1,5})")
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
MAX_FRAME_BYTES = 1024 * 1024
WINDOW_BYTES = 2 * 1024 * 1024
REDIS_RUN_ID_KEY = "x-milepost-redis-run-id"

ChannelOptions = Sequence[tuple[str, int | str]]

_BOTH: list[tuple[str, int | str]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # With gRPC's 16 KiB and 64 KiB a message of samples is some forty pieces, each of which waits for window
    # and is appended to what came before: a third more CPU on both sides.
    ("grpc.http2.max_frame_size", MAX_FRAME_BYTES),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT_OPTIONS: ChannelOptions = [
    *_BOTH,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # The least time that one attempt to connect may take, in spite of its name: a slow network needs it.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
    # Retries are ours (RetryPolicy): grpc's own would multiply with them.
    ("grpc.enable_retries", 0),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
]
SERVER_OPTIONS: ChannelOptions = [
    *_BOTH,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How a client asks again when a call ends with UNAVAILABLE; every call of Milepost may be repeated.

    Attributes:
      retry_for_s: keep trying this long after the first failure; 0 never retries.
      first_delay_s: wait before the first retry; doubles up to `max_delay_s`, with full jitter.
      max_delay_s: longest wait.
    """

    retry_for_s: float = 30.0
    first_delay_s: float = 0.05
    max_delay_s: float = 1.0


DEFAULT_RETRY = RetryPolicy()
NO_RETRY = RetryPolicy(retry_for_s=0.0)


def check_address(field: str, value: str, *, lowest_port: int = 1) -> None:
    """Refuses what is not `host:port`; gRPC itself would take port 99999 for another one.

    Raises:
      InvalidArgument: names the field, the value and the remedy.
    """
    match = _ADDRESS.fullmatch(value)
    if not match or not lowest_port <= int(match[2]) <= 65535:
        raise InvalidArgument(
            f"{field} = {value!r}: no address; give host:port, with a port from {lowest_port} to 65535",
            reason="BAD_SETTING",
        )


def open_channel(address: str) -> Channel:
    """A channel without transport security to `host:port`."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
