"""Settings of the buffer service: the table [buffer]."""

from __future__ import annotations

from pydantic import Field

from milepost_common.settings import ServiceSettings


class BufferSettings(ServiceSettings, table="buffer"):
    """The buffer: where it listens and which Redis holds the ledger."""

    listen: str = "127.0.0.1:7101"
    """Address of the gRPC server, host:port; port 0 takes a free one."""

    advertise: str = ""
    """Address under which others reach it. Empty: `listen`."""

    metrics_listen: str = "127.0.0.1:9101"
    """Where Prometheus finds `/metrics`, host:port; port 0 takes a free one. Empty: nowhere."""

    redis_url: str = ""
    """URL (redis://, rediss:// or unix://) of the Redis that holds the ledger. Empty: an embedded server in
    `data_dir`."""

    data_dir: str = "milepost-data"
    """Folder of the embedded server's append-only file. Unused with `redis_url`."""

    redis_wait_s: float = Field(default=10.0, ge=0, le=3600)
    """How long to wait at the start for Redis to answer, or for `data_dir` to be free, in seconds."""

    redis_timeout_s: float = Field(default=8.0, gt=0, le=600)
    """Deadline of one call to Redis, in seconds; shorter than the clients' own, which then are told who is
    away."""

    redis_liveness_timeout_s: float = Field(default=15.0, ge=0, le=3600)
    """The embedded server is killed and started again when it answered nothing for this long; 0: never."""

    require_aof: bool = True
    """Refuse a Redis without an append-only file. False accepts that a restart of Redis loses the run."""

    appendfsync: str = Field(default="always", pattern="^(always|everysec)$")
    """When the embedded server syncs its file: `always`, or `everysec`, which may lose a second or more."""
