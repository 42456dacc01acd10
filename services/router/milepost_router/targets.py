"""Which of an engine's routes can be reached through the router, and what they are."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

_GENERATING = frozenset((b"/generate", b"/v1/completions", b"/v1/chat/completions"))
_KEYED = _GENERATING | {b"/v1/responses"}


def is_passed(path: str) -> bool:
    """Only /generate and /v1/*, and no way out of /v1 by dots."""
    if path == "/generate":
        return True
    return path.startswith("/v1/") and ".." not in path.split("/") and "\\" not in path


def is_passed_plainly(target: bytes) -> bool:
    """The same of a target that needs no decoding and names no way out; others are looked at by a task."""
    if target == b"/generate":
        return True
    return target.startswith(b"/v1/") and b".." not in target and b"%" not in target and b"\\" not in target


def generates(target: bytes) -> bool:
    """A good reply to it holds tokens."""
    return _path(target) in _GENERATING


def takes_key(target: bytes) -> bool:
    """SGLang heeds an `extra_key` in its body."""
    return _path(target) in _KEYED


def _path(target: bytes) -> bytes:
    path = target.partition(b"?")[0]
    return unquote_to_bytes(path) if b"%" in path else path
