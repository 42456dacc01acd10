"""The names of rewards: `exact`, `math`, `regex:PATTERN`, `module:function`, `grpc://host:port`."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from enum import Enum

from milepost.errors import InvalidArgument

KNOWN = ("exact", "math", "regex:PATTERN", "module:function", "grpc://host:port")
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}")


class Kind(Enum):
    """Where a reward runs."""

    NONE = "none"
    INLINE = "inline"
    WORKER = "worker"
    REMOTE = "remote"


@dataclass(frozen=True, kw_only=True)
class RewardName:
    """A reward's name, read."""

    name: str
    kind: Kind
    address: str = ""

    @property
    def reads_text(self) -> bool:
        """It looks at nothing but the response's text, so without a tokenizer it would see none."""
        return self.kind is Kind.INLINE or self.name == "math" or self.name.startswith("regex:")


def read_name(name: str) -> RewardName:
    """Reads a reward's name; the empty one means that nothing is scored.

    Raises:
      InvalidArgument: nothing is called so, or the pattern cannot be compiled; names the remedy.
    """
    if not name:
        return RewardName(name=name, kind=Kind.NONE)
    if name == "exact":
        return RewardName(name=name, kind=Kind.INLINE)
    if name == "math":
        return RewardName(name=name, kind=Kind.WORKER)
    if name.startswith("grpc://"):
        return RewardName(name=name, kind=Kind.REMOTE, address=_address(name))
    if name.startswith("regex:"):
        _check_pattern(name)
        return RewardName(name=name, kind=Kind.WORKER)
    if _FUNCTION.fullmatch(name):
        return RewardName(name=name, kind=Kind.WORKER)
    near = difflib.get_close_matches(name, ("exact", "math"), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(KNOWN)}"
    raise InvalidArgument(f"reward {name!r} is not known; {hint}", reason="UNKNOWN_REWARD")


def _address(name: str) -> str:
    address = name.removeprefix("grpc://")
    if not _ADDRESS.fullmatch(address):
        raise InvalidArgument(f"reward {name!r}: {address!r} is no address; write grpc://host:port")
    return address


def _check_pattern(name: str) -> None:
    pattern = name.removeprefix("regex:")
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidArgument(
            f"reward {name!r}: the pattern cannot be compiled ({error}); mend the pattern",
            reason="BAD_PATTERN",
        ) from None
