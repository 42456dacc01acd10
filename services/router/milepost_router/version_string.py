"""The string an engine carries as its weight version, written by the router alone.

<run>/<version>/<label>     complete weights: verified, and published or about to be
updating/<transaction>      between the first byte of a transaction and its verification: nobody's weights
anything else               weights that the router did not put there ("default" after an engine's start)
"""

from __future__ import annotations

from dataclasses import dataclass

UPDATING = "updating/"


@dataclass(frozen=True)
class LoadedVersion:
    """Complete weights: the run, the number and the label (the step whose weights they are)."""

    run_id: str
    version: int
    label: int

    def __str__(self) -> str:
        return f"{self.run_id}/{self.version}/{self.label}"


def updating(transaction_id: str) -> str:
    """The string of an engine whose weights are being replaced by this transaction."""
    return UPDATING + transaction_id


def is_written(text: str) -> bool:
    """A router wrote it: complete weights, or weights that are being replaced."""
    return text.startswith(UPDATING) or parse(text) is not None


def parse(text: str) -> LoadedVersion | None:
    """Reads a version string; None where it does not name complete weights of a run."""
    if text.startswith(UPDATING):
        return None
    run_id, _, rest = text.partition("/")
    version, _, label = rest.partition("/")
    if not (run_id and _is_number(version) and _is_number(label)) or int(version) < 1:
        return None
    return LoadedVersion(run_id, int(version), int(label))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 20
