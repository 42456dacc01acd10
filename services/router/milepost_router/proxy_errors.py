"""What a client of the HTTP side is told when its request cannot be served: one JSON shape, OpenAI's.

    {"error": {"message": ..., "type": ..., "param": null, "code": "NO_ENGINE_FITS", "metadata": {...}}}

`type` is one of OpenAI's, chosen by the status; `code` is the reason, a constant for programs.
"""

from __future__ import annotations

import math

import orjson

from milepost.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, MilepostError, Unavailable

RETRY_AFTER_S = 1.0


def no_engine_fits(asked: str, fleet: str) -> Unavailable:
    """No engine serves what the request asks for, and none is about to."""
    return Unavailable(
        f"no engine fits: asked for {asked}; the fleet: {fleet}. Ask again later",
        reason="NO_ENGINE_FITS",
        metadata={"asked": asked, "fleet": fleet},
        retry_after_s=RETRY_AFTER_S,
    )


def engines_failed(failures: list[str]) -> Unavailable:
    """Every engine that was tried failed."""
    return Unavailable(
        f"{len(failures)} attempts failed: {'; '.join(failures)}",
        reason="ENGINE_FAILED",
        retry_after_s=RETRY_AFTER_S,
    )


def stream_broke(why: str) -> Unavailable:
    """The engine went away after the first bytes of a stream were passed on."""
    return Unavailable(
        f"the stream broke off: {why}; go on from the tokens that came",
        reason="STREAM_BROKE",
        retry_after_s=RETRY_AFTER_S,
    )


def pinned_version_gone(version: int) -> FailedPrecondition:
    """The engine of a request that wants exactly one version got other weights."""
    return FailedPrecondition(
        f"x-milepost-version = {version}: its engine was given other weights before it finished, "
        "and no other engine serves that version; ask for a version that is served",
        reason="PINNED_VERSION_GONE",
        metadata={"version": str(version)},
    )


def deadline_passed(deadline_s: float) -> DeadlineExceeded:
    """The request's own deadline passed."""
    return DeadlineExceeded(f"not answered within {deadline_s:g} s; allow more by x-milepost-deadline-ms")


def bad_header(name: str, value: str, wanted: str) -> InvalidArgument:
    """A header of ours is not what it should be."""
    return InvalidArgument(f"header {name} = {value!r}: give {wanted}", reason="BAD_HEADER")


def render(error: MilepostError) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and body of an error."""
    body = json_body(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    return error.http_status, headers, body


def json_body(error: MilepostError) -> bytes:
    """The body of an error."""
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    detail = {
        "message": error.message,
        "type": kind,
        "param": None,
        "code": error.reason,
        "metadata": error.metadata,
    }
    return orjson.dumps({"error": detail})


def sse_event(error: MilepostError) -> bytes:
    """The error as the last event of a stream."""
    return b"data: " + json_body(error) + b"\n\n"
