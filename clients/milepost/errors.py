"""The one error tree, and the one table between errors, gRPC statuses and HTTP statuses.

    MilepostError
    |- InvalidArgument (ValueError)        a field is wrong; fix the request
    |- NotFound (KeyError)                 no such run, prompt, version, engine
    |- AlreadyExists                       the name is taken by other content
    |- FailedPrecondition                  the state does not allow it; look, then decide
    |  |- LeaseLost                        another gateway holds the prompt now
    |  |- StaleTerm                        a newer trainer (or router) has taken over; fatal for the caller
    |  `- StaleEpoch                       the fleet changed; prepare again
    |- ResourceExhausted                   no credits or no room; wait `retry_after_s`
    |- OutOfRange                          nothing will ever come: the run is finished
    |- DataLoss                            payloads are gone that the request needs; a decision is needed
    |- Unavailable (ConnectionError)       nobody there or not ready; retried by clients until their deadline
    |- DeadlineExceeded (TimeoutError)     the deadline passed; the effect is unknown, ask again
    |- Cancelled                           the caller went away
    |- Unauthenticated                     a key is missing or wrong
    |- Unimplemented                       this build does not do it
    `- Internal                            a defect of ours

An error says which field, which value, and what to do about it; `reason` is a constant for programs and
`metadata` carries the values. Both travel as google.rpc.ErrorInfo under the domain `milepost.dev`.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc

DOMAIN = "milepost.dev"


class MilepostError(Exception):
    """Root of everything Milepost raises.

    Attributes:
      message: what is wrong, with the field, the value and the remedy.
      reason: UPPER_SNAKE constant for programs, e.g. ``STALE_TERM``.
      metadata: values by name, as strings.
      retry_after_s: seconds after which asking again may help; None when waiting does not help.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN
    http_status: int = 500
    default_reason: str = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class InvalidArgument(MilepostError, ValueError):
    """A field of the request is wrong. Never retried."""

    code, http_status, default_reason = grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_ARGUMENT"


class NotFound(MilepostError, KeyError):
    """What the request names does not exist."""

    code, http_status, default_reason = grpc.StatusCode.NOT_FOUND, 404, "NOT_FOUND"


class AlreadyExists(MilepostError):
    """The name exists with other content."""

    code, http_status, default_reason = grpc.StatusCode.ALREADY_EXISTS, 409, "ALREADY_EXISTS"


class FailedPrecondition(MilepostError):
    """The state does not allow it."""

    code, http_status, default_reason = grpc.StatusCode.FAILED_PRECONDITION, 412, "FAILED_PRECONDITION"


class LeaseLost(FailedPrecondition):
    """The lease expired and the prompt belongs to somebody else; forget the work."""

    default_reason = "LEASE_LOST"


class StaleTerm(FailedPrecondition):
    """A newer term exists: the caller was replaced and must stop."""

    default_reason = "STALE_TERM"


class StaleEpoch(FailedPrecondition):
    """The fleet changed since the transaction was prepared; prepare it again."""

    default_reason = "STALE_EPOCH"


class ResourceExhausted(MilepostError):
    """No credits or no room now; wait and ask again."""

    code, http_status, default_reason = grpc.StatusCode.RESOURCE_EXHAUSTED, 429, "RESOURCE_EXHAUSTED"


class OutOfRange(MilepostError):
    """Nothing will ever come: the run is finished."""

    code, http_status, default_reason = grpc.StatusCode.OUT_OF_RANGE, 416, "OUT_OF_RANGE"


class DataLoss(MilepostError):
    """Data that the request needs is gone; the caller has to choose how to go on."""

    code, http_status, default_reason = grpc.StatusCode.DATA_LOSS, 500, "DATA_LOSS"


class Unavailable(MilepostError, ConnectionError):
    """Nobody answers, or not yet. Clients retry until their deadline."""

    code, http_status, default_reason = grpc.StatusCode.UNAVAILABLE, 503, "UNAVAILABLE"


class DeadlineExceeded(MilepostError, TimeoutError):
    """The deadline passed. Whether it took effect is unknown; every mutation may be asked again."""

    code, http_status, default_reason = grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED"


class Cancelled(MilepostError):
    """The caller went away."""

    code, http_status, default_reason = grpc.StatusCode.CANCELLED, 499, "CANCELLED"


class Unauthenticated(MilepostError):
    """A key is missing or wrong."""

    code, http_status, default_reason = grpc.StatusCode.UNAUTHENTICATED, 401, "UNAUTHENTICATED"


class Unimplemented(MilepostError):
    """This build does not do it."""

    code, http_status, default_reason = grpc.StatusCode.UNIMPLEMENTED, 501, "UNIMPLEMENTED"


class Internal(MilepostError):
    """A defect of ours: please report it."""

    code, http_status, default_reason = grpc.StatusCode.INTERNAL, 500, "INTERNAL"


_CATEGORIES: tuple[type[MilepostError], ...] = (
    InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted, OutOfRange, DataLoss,
    Unavailable, DeadlineExceeded, Cancelled, Unauthenticated, Unimplemented, Internal,
)  # fmt: skip
_REFINED: tuple[type[MilepostError], ...] = (LeaseLost, StaleTerm, StaleEpoch)
BY_CODE: Mapping[grpc.StatusCode, type[MilepostError]] = {e.code: e for e in _CATEGORIES}
BY_REASON: Mapping[str, type[MilepostError]] = {e.default_reason: e for e in _REFINED}
BY_HTTP_STATUS: Mapping[int, type[MilepostError]] = {e.http_status: e for e in reversed(_CATEGORIES)}


def from_status(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    metadata: Mapping[str, str] | None = None,
    retry_after_s: float | None = None,
) -> MilepostError:
    """Makes the error of a gRPC status; `reason` picks the refined class where there is one."""
    kind = BY_REASON.get(reason) or BY_CODE.get(code, MilepostError)
    return kind(message, reason=reason or None, metadata=metadata, retry_after_s=retry_after_s)
