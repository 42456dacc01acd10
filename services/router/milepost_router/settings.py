"""Settings of the router: the table [router]."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from milepost_common.settings import ServiceSettings, Table
from milepost_router.fleet import FleetLimits
from milepost_router.routing import Policy


class EngineSettings(Table):
    """One engine known beforehand."""

    url: str
    """Base URL, for example http://127.0.0.1:30000."""
    id: str = ""
    """Its name; unset: host:port of the URL."""
    run_id: str = ""
    """The only run it works for; unset: any run may claim it."""


class RouterSettings(ServiceSettings, table="router"):
    """Everything the router can be told."""

    listen: str = "127.0.0.1:7102"
    """Where the gRPC service listens, host:port; port 0 takes a free one."""
    http_listen: str = "127.0.0.1:7202"
    """Where /generate and /v1 are served, host:port."""
    advertise: str = ""
    """Address of the gRPC service as others reach it. Unset: `listen`."""
    http_advertise: str = ""
    """Address of the HTTP side as others reach it. Unset: `http_listen`."""
    metrics_listen: str = "127.0.0.1:9102"
    """Where Prometheus finds `/metrics`, host:port; port 0 takes a free one. Empty: nowhere."""
    buffer: str = "127.0.0.1:7101"
    """Address of the buffer, which keeps the weight versions. Empty: engines serve unversioned weights."""
    engines: Annotated[tuple[EngineSettings | str, ...], NoDecode] = ()
    """Engines known beforehand, as URLs or tables; others register themselves."""
    admin_api_key: str = Field(default="", repr=False)
    """Key of the engines' admin routes, where they do not register with their own."""

    policy: Policy = "session_affinity"
    """session_affinity: x-milepost-session stays with its engine; least_in_flight: sessions are ignored."""
    request_retries: int = Field(default=2, ge=0, le=10)
    """How often a request is given to another engine after a failure."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of a request without x-milepost-deadline-ms; it stops while its engine is paused by us."""
    admit_wait_s: float = Field(default=30.0, ge=0)
    """How long a request waits for an engine that is joining or being updated."""
    connect_timeout_s: float = Field(default=3.0, gt=0)
    """To open a connection to an engine."""
    max_body_bytes: int = Field(default=64 * 1024 * 1024, gt=0)
    """Largest request body."""

    probe_interval_s: float = Field(default=1.0, gt=0)
    """How often each engine is looked at."""
    probe_timeout_s: float = Field(default=5.0, gt=0)
    """Deadline of one look."""
    probe_failures: int = Field(default=3, ge=1)
    """Failed looks in a row after which an engine is DEAD."""
    request_failures: int = Field(default=5, ge=1)
    """Failed requests in a row after which an engine is QUARANTINED."""
    heartbeat_interval_s: float = Field(default=2.0, gt=0)
    """How often registered engines are asked to send a heartbeat."""
    quarantine_s: float = Field(default=1.0, ge=0)
    """First pause of a failed engine before it is synced again; doubles with each failure in a row."""
    quarantine_max_s: float = Field(default=60.0, ge=0)
    """Where that doubling ends."""

    engine_call_timeout_s: float = Field(default=15.0, gt=0)
    """Deadline of an engine's admin call (pause, continue, version string, ...)."""
    bucket_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of one bucket on every member."""
    transaction_timeout_s: float = Field(default=120.0, gt=0, le=3600)
    """Deadline of a whole weight transaction that names none."""
    commit_wait_s: float = Field(default=10.0, gt=0)
    """How long a transaction whose buckets all arrived waits for its commit."""
    abort_grace_s: float = Field(default=2.0, ge=0)
    """How long requests that were aborted may take to hand over their partial tokens."""
    verify_checksum: bool = True
    """Compare checksums of engines of one layout before a commit."""
    ledger_timeout_s: float = Field(default=5.0, gt=0)
    """Deadline of one call to the buffer."""

    @field_validator("engines", mode="before")
    @classmethod
    def _split_urls(cls, value: object) -> object:
        """The environment and flags give URLs separated by commas."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @property
    def limits(self) -> FleetLimits:
        """When the fleet gives an engine up."""
        return FleetLimits(
            probe_failures=self.probe_failures,
            request_failures=self.request_failures,
            quarantine_s=self.quarantine_s,
            quarantine_max_s=self.quarantine_max_s,
        )
