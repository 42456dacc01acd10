"""The run's configuration: defaults, bounds, what is live, and its form in Redis. Pure functions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from milepost.errors import InvalidArgument
from milepost.types import ErrorPolicy, OnStale, RunConfig, SamplingParams, Tail
from milepost_buffer.checks import check_sampling

MIB = 1024 * 1024
MAX_GROUP_BYTES = 15 * MIB
MAX_STALENESS = 256
MAX_COUNT = 1 << 20

DEFAULTS = RunConfig(
    groups_per_step=32,
    samples_per_prompt=8,
    max_staleness=2,
    publish_every=1,
    on_stale=OnStale.REQUEUE,
    stale_attempts=2,
    max_attempts=5,
    lease_ttl_s=30.0,
    max_group_bytes=4 * MIB,
    max_payload_bytes=8 * 1024 * MIB,
    tail=Tail.TRAIN,
    error_policy=ErrorPolicy.RETRY,
    reward="exact",
    filter_equal_rewards=False,
    max_lag_steps=100,
)
LIVE = frozenset(
    {
        "groups_per_step", "max_staleness", "publish_every", "on_stale", "stale_attempts", "max_attempts",
        "lease_ttl_s", "max_payload_bytes", "filter_equal_rewards",
    }
)  # fmt: skip
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "groups_per_step": (1, MAX_COUNT),
    "samples_per_prompt": (1, MAX_COUNT),
    "max_staleness": (0, MAX_STALENESS),
    "publish_every": (1, MAX_STALENESS + 1),
    "stale_attempts": (0, MAX_COUNT),
    "max_attempts": (1, MAX_COUNT),
    "lease_ttl_s": (0.001, 86400.0),
    "max_group_bytes": (1, MAX_GROUP_BYTES),
    "max_payload_bytes": (1, 1 << 50),
    "max_lag_steps": (1, MAX_COUNT),
}
_NUMBERS = (
    "groups_per_step", "samples_per_prompt", "max_staleness", "stale_attempts", "max_attempts",
    "max_group_bytes", "max_payload_bytes", "on_stale", "tail", "error_policy",
)  # fmt: skip


def check_run_id(run_id: str) -> None:
    """Raises InvalidArgument unless it is a run's name."""
    if not _RUN_ID.fullmatch(run_id):
        raise InvalidArgument(f"run_id = {run_id!r}: give 1 to 128 characters of A-Z a-z 0-9 . _ -")


def given(config: RunConfig) -> dict[str, Any]:
    """The fields that are set."""
    unset = RunConfig()
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {name: value for name, value in values.items() if value != getattr(unset, name)}


def resolve(config: RunConfig) -> RunConfig:
    """Fills in the defaults and checks the result.

    Raises:
      InvalidArgument: names the field, its value and the bound.
    """
    resolved = replace(DEFAULTS, **given(config))
    check(resolved)
    return resolved


def change(config: RunConfig, update: RunConfig) -> RunConfig:
    """The configuration after a live change.

    Raises:
      InvalidArgument: a field is not live, or the result breaks a bound.
    """
    changes = given(update)
    frozen = sorted(set(changes) - LIVE)
    if frozen:
        raise InvalidArgument(
            f"config.{frozen[0]} = {changes[frozen[0]]}: it cannot change while a run lives; live fields are "
            f"{', '.join(sorted(LIVE))}"
        )
    changed = replace(config, **changes)
    check(changed)
    return changed


def check(config: RunConfig) -> None:
    """Checks a resolved configuration against its bounds and against itself."""
    for name, (low, high) in _BOUNDS.items():
        value = getattr(config, name)
        if not low <= value <= high:
            raise InvalidArgument(f"config.{name} = {value}: give a value from {low:g} to {high:g}")
    if config.sampling is not None:
        check_sampling(config.sampling, where="config.sampling")
    c: Any = config
    if c.max_staleness < c.publish_every - 1:
        raise InvalidArgument(
            f"config.max_staleness = {c.max_staleness} with publish_every = {c.publish_every}: the last step "
            f"before a publication could never fill; give max_staleness >= {c.publish_every - 1}"
        )
    least = 2 * c.groups_per_step * c.max_group_bytes
    if c.max_payload_bytes < least:
        raise InvalidArgument(
            f"config.max_payload_bytes = {c.max_payload_bytes}: two steps of {c.groups_per_step} groups of "
            f"{c.max_group_bytes} bytes need {least}; raise it, or lower max_group_bytes"
        )


def differences(there: RunConfig, asked: RunConfig) -> str:
    """In words: the fields of one configuration that another one wants otherwise."""
    names = [f.name for f in fields(RunConfig) if getattr(there, f.name) != getattr(asked, f.name)]
    return ", ".join(f"{n} = {getattr(there, n)!r} (asked for {getattr(asked, n)!r})" for n in names)


def to_json(config: RunConfig) -> str:
    """Canonical JSON, so that equal configurations are equal strings."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))


def from_json(text: str | bytes) -> RunConfig:
    """Reads what `to_json` wrote; fields of a newer build are passed over."""
    raw: dict[str, Any] = json.loads(text)
    known = {f.name for f in fields(RunConfig)}
    values = {name: value for name, value in raw.items() if name in known}
    sampling = values.get("sampling")
    if sampling is not None:
        tuples: dict[str, Any] = {name: tuple(sampling[name]) for name in ("stop", "stop_token_ids")}
        values["sampling"] = SamplingParams(**{**sampling, **tuples})
    values |= {
        "on_stale": OnStale(values["on_stale"]),
        "tail": Tail(values["tail"]),
        "error_policy": ErrorPolicy(values["error_policy"]),
    }
    return RunConfig(**values)


def script_numbers(config: RunConfig) -> list[str]:
    """The numbers that scripts need, as name, value, name, value."""
    pairs = [(name, int(getattr(config, name))) for name in _NUMBERS]
    pairs.append(("lease_ttl_ms", round((config.lease_ttl_s or 0.0) * 1000)))
    return [str(x) for pair in pairs for x in pair]
