"""Headers of the HTTP side, both ways, as raw bytes.

A request may carry                                    a reply carries
  x-milepost-run            the run                      x-milepost-engine         who answered
  x-milepost-min-version    this version or a newer one  x-milepost-version-start  its version when it began
  x-milepost-version        exactly this version         x-milepost-version-end    and when it ended
  x-milepost-session        stays with one engine
  x-milepost-deadline-ms    answer within this

The two versions bracket those of the reply's tokens. A stream's head cannot know how it ends: there the end
comes as a last comment of the event stream, `: x-milepost-version-end: 7`, which every parser of such streams
skips (uvicorn has no trailers).
"""

from __future__ import annotations

from dataclasses import dataclass

from milepost_router.proxy_errors import bad_header
from milepost_router.routing import ANY, Ask
from milepost_router.upstream import RawHeaders

_PREFIX = b"x-milepost-"
_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade")
)  # fmt: skip
_REPLACED = _HOP_BY_HOP | {b"content-length"}
_NOT_PASSED = _HOP_BY_HOP | {b"host", b"content-length", b"expect"}
_KNOWN = frozenset(("run", "min-version", "version", "session", "deadline-ms"))


@dataclass(slots=True)
class Request:
    """What the router takes from a request's headers. Never changed; freezing it would cost as much again.

    Attributes:
      ask: what it demands of its engine.
      deadline_s: answer within this; 0: the router's default.
      passed: the other headers, as they go on to the engine.
    """

    ask: Ask
    deadline_s: float
    passed: bytes


def read(headers: RawHeaders) -> Request:
    """Sorts the headers of a request.

    Raises:
      InvalidArgument: one of ours is unknown or has a wrong value.
    """
    ours: dict[str, str] = {}
    passed: list[bytes] = []
    for name, value in headers:
        if name.startswith(_PREFIX):
            ours[name[len(_PREFIX) :].decode("latin-1")] = value.decode("latin-1").strip()
        elif name not in _NOT_PASSED:
            passed.append(name + b": " + value)
    if not ours:
        return Request(ANY, 0.0, b"\r\n".join(passed))
    unknown = sorted(set(ours) - _KNOWN)
    if unknown:
        wanted = f"only {', '.join(f'x-milepost-{name}' for name in sorted(_KNOWN))}"
        raise bad_header(f"x-milepost-{unknown[0]}", ours[unknown[0]], wanted)
    ask = Ask(
        run_id=ours.get("run", ""),
        min_version=_number(ours, "min-version"),
        version=_number(ours, "version"),
        session=ours.get("session", ""),
    )
    return Request(ask, _number(ours, "deadline-ms") / 1000, b"\r\n".join(passed))


def request_head(method: bytes, target: bytes, host: bytes, passed: bytes, body_bytes: int) -> bytes:
    """The head of a request to an engine."""
    line = b"%s %s HTTP/1.1\r\nhost: %s\r\n" % (method, target, host)
    length = b"content-length: %d\r\n" % body_bytes if body_bytes or method != b"GET" else b""
    return line + (passed + b"\r\n" if passed else b"") + length + b"\r\n"


def reply_headers(
    upstream: RawHeaders, *, engine_id: str, start: int, end: int | None, length: int | None = None
) -> RawHeaders:
    """The head of a reply to a client; `end` is None where it comes later, `length` with a stream."""
    left_out = _HOP_BY_HOP if length is None else _REPLACED
    headers = [header for header in upstream if header[0] not in left_out]
    headers.append((b"x-milepost-engine", engine_id.encode()))
    headers.append((b"x-milepost-version-start", b"%d" % start))
    if end is not None:
        headers.append((b"x-milepost-version-end", b"%d" % end))
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    return headers


def whole_reply_head(upstream: RawHeaders, *, engine_id: str, version: tuple[int, int], length: int) -> bytes:
    """The same of a reply that is there whole, as lines; `version` is that of its begin and its end."""
    kept = [b"%s: %s\r\n" % header for header in upstream if header[0] not in _REPLACED]
    ours = (
        b"x-milepost-engine: %s\r\nx-milepost-version-start: %d\r\nx-milepost-version-end: %d\r\n"
        b"content-length: %d\r\n" % (engine_id.encode(), *version, length)
    )
    return b"".join((*kept, ours))


def with_length(headers: RawHeaders, size: int) -> RawHeaders:
    """The headers with the length of a body that was read whole."""
    return [*((k, v) for k, v in headers if k != b"content-length"), (b"content-length", b"%d" % size)]


def end_of_stream(version: int) -> bytes:
    """The comment that ends an event stream."""
    return b": x-milepost-version-end: %d\n\n" % version


def _number(ours: dict[str, str], name: str) -> int:
    text = ours.get(name, "")
    if not text:
        return 0
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise bad_header(f"x-milepost-{name}", text, "a whole number of at least 0, or leave it out")
    return int(text)
