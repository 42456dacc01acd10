"""The table `[run]` -> the RunConfig that the buffer is handed. Unset stays unset: the buffer fills in
defaults."""

from __future__ import annotations

from milepost import types as t
from milepost_trainer.settings import RunTable, SamplingTable


def to_run_config(table: RunTable) -> t.RunConfig:
    """What CreateRun is asked for."""
    return t.RunConfig(
        groups_per_step=table.groups_per_step,
        samples_per_prompt=table.samples_per_prompt,
        max_staleness=table.max_staleness,
        publish_every=table.publish_every,
        on_stale=t.OnStale[(table.on_stale or "unspecified").upper()],
        stale_attempts=table.stale_attempts,
        max_attempts=table.max_attempts,
        lease_ttl_s=table.lease_ttl_s,
        max_group_bytes=table.max_group_bytes,
        max_payload_bytes=table.max_payload_bytes,
        tail=t.Tail[(table.tail or "unspecified").upper()],
        error_policy=t.ErrorPolicy[(table.error_policy or "unspecified").upper()],
        sampling=None if table.sampling is None else _sampling(table.sampling),
        reward=table.reward,
        filter_equal_rewards=table.filter_equal_rewards,
        max_lag_steps=table.max_lag_steps,
    )


def _sampling(table: SamplingTable) -> t.SamplingParams:
    return t.SamplingParams(
        temperature=table.temperature,
        top_p=table.top_p,
        top_k=table.top_k,
        min_p=table.min_p,
        max_new_tokens=table.max_new_tokens,
        stop=table.stop,
        stop_token_ids=table.stop_token_ids,
        seed=table.seed,
        ignore_eos=table.ignore_eos,
    )
