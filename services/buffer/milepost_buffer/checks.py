"""What a request must look like before it may reach the ledger. Pure functions; errors name the remedy."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from milepost.errors import InvalidArgument
from milepost.types import Group, GroupHeader, Prompt, SamplingParams

MAX_WAIT_S = 60.0
MAX_ID_BYTES = 512
MAX_PROMPT_BYTES = 4 * 1024 * 1024
MAX_EXACT = (1 << 53) - 1


def check_name(field: str, value: str, *, longest: int = MAX_ID_BYTES) -> None:
    """A name of 1 to `longest` bytes."""
    size = len(value.encode())
    if not 1 <= size <= longest:
        raise InvalidArgument(f"{field} = {_short(value)!r}: {size} bytes; give 1 to {longest}")


def check_count(field: str, count: int, *, most: int) -> None:
    """1 to `most` elements."""
    if not 1 <= count <= most:
        raise InvalidArgument(f"{field}: {count} given; give 1 to {most} in one call")


def check_range(field: str, value: float, low: float, high: float) -> None:
    """A number between two bounds, both allowed."""
    if not low <= value <= high:
        raise InvalidArgument(f"{field} = {value}: give a value from {low:g} to {high:g}")


def check_wait(seconds: float | None, *, most: float = MAX_WAIT_S) -> float:
    """A `max_wait` in seconds; unset is 0."""
    wait_s = seconds or 0.0
    check_range("max_wait", wait_s, 0.0, most)
    return wait_s


def check_prompt(prompt: Prompt, *, size_bytes: int, where: str) -> None:
    """A prompt as its message says."""
    check_name(f"{where}.prompt_id", prompt.prompt_id)
    name = f"{where} (prompt_id = {_short(prompt.prompt_id)!r})"
    if prompt.text is None and prompt.messages is None and prompt.input_ids is None:
        raise InvalidArgument(f"{name}: no input; set text, chat or input_ids")
    if prompt.messages is not None and not prompt.messages:
        raise InvalidArgument(f"{name}: chat.messages is empty; give at least one message")
    if prompt.input_ids is not None and (prompt.input_ids.size == 0 or int(prompt.input_ids.min()) < 0):
        raise InvalidArgument(f"{name}: input_ids is empty or holds a negative id; give int32 token ids")
    if size_bytes > MAX_PROMPT_BYTES:
        raise InvalidArgument(f"{name}: {size_bytes} bytes; give at most {MAX_PROMPT_BYTES}")
    if prompt.metadata_json:
        _check_metadata(name, prompt.metadata_json)
    if prompt.sampling is not None:
        check_sampling(prompt.sampling, where=f"{name}.sampling")


def _check_metadata(name: str, text: str) -> None:
    try:
        value: Any = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(
            f"{name}: metadata_json = {_short(text)!r} is not JSON ({error}); give an object"
        ) from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name}: metadata_json = {_short(text)!r}: give a JSON object, as {{}}")


def check_sampling(sampling: SamplingParams, *, where: str) -> None:
    """Sampling parameters in their ranges."""
    if sampling.temperature is not None:
        check_range(f"{where}.temperature", sampling.temperature, 0.0, 100.0)
    if sampling.top_p is not None and not 0.0 < sampling.top_p <= 1.0:
        raise InvalidArgument(f"{where}.top_p = {sampling.top_p}: give a value above 0, up to 1")
    if sampling.top_k is not None and sampling.top_k != -1 and sampling.top_k < 1:
        raise InvalidArgument(f"{where}.top_k = {sampling.top_k}: give -1 for off, or at least 1")
    if sampling.min_p is not None:
        check_range(f"{where}.min_p", sampling.min_p, 0.0, 1.0)
    if sampling.max_new_tokens is not None and sampling.max_new_tokens < 1:
        raise InvalidArgument(f"{where}.max_new_tokens = {sampling.max_new_tokens}: give at least 1")


def group_problem(group: Group) -> str | None:
    """What is wrong with a group by itself, in words, or None. The run's limits are the script's to check."""
    header = group.header
    samples = len(header.num_tokens)
    for name in ("outcomes", "rewards"):
        if len(getattr(header, name)) != samples:
            given = len(getattr(header, name))
            return f"{name} has {given} entries, num_tokens has {samples}; give one for each sample"
    return _header_problem(header) or _payload_problem(group)


def _header_problem(header: GroupHeader) -> str | None:
    if any(int(o) == 0 for o in header.outcomes):
        return "outcomes holds OUTCOME_UNSPECIFIED; say how each sample ended"
    if 0 in header.num_tokens:
        return "num_tokens holds 0; a sample has at least its prompt's tokens"
    if any(math.isinf(r) for r in header.rewards):
        return f"rewards = {list(header.rewards)}: give finite numbers, or NaN where there is none"
    if header.num_loss_tokens > sum(header.num_tokens):
        total = sum(header.num_tokens)
        return f"num_loss_tokens = {header.num_loss_tokens} of {total} tokens; count the masks again"
    versions = header.weight_versions
    if any(b <= a for a, b in itertools.pairwise(versions)):
        return f"weight_versions = {list(versions)}: give each once, ascending"
    if 0 in versions:
        return "weight_versions holds 0, weights that no ledger names; use engines that serve this run"
    if not versions and header.num_loss_tokens:
        return "weight_versions is empty but tokens are trained on; name the versions that generated them"
    if any(v > MAX_EXACT for v in versions):
        return f"weight_versions = {list(versions)}: numbers above 2^53 - 1 are not supported"
    return None


def _payload_problem(group: Group) -> str | None:
    if not group.payload:
        return "payload is empty; give a serialized GroupPayload"
    if len(group.header.digest) != 32:
        return f"digest has {len(group.header.digest)} bytes; give the 32 of SHA-256 over the payload"
    if hashlib.sha256(group.payload).digest() != group.header.digest:
        return "digest is not the SHA-256 of the payload; it was damaged on the way, put it again"
    return None


def first_duplicate(names: Sequence[str]) -> str | None:
    """The first name that stands twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
