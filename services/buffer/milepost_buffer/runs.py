"""Runs: made, read, changed while they live."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from milepost import errors
from milepost import types as t
from milepost_buffer import run_config
from milepost_buffer.store import RUNS_KEY, Store

UPDATE_TRIES = 8


class Runs:
    """The runs on one Redis."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(self, run_id: str, *, config: t.RunConfig) -> tuple[t.Run, bool]:
        """Makes a run, or reads it when it is there with the same config; returns it and whether it is new.

        Raises:
          InvalidArgument: a field of the config.
          AlreadyExists: it is there with another config.
        """
        run_config.check_run_id(run_id)
        resolved = run_config.resolve(config)
        await self._store.command("SADD", RUNS_KEY, run_id)
        try:
            created = await self._store.call(
                run_id, "create", run_config.to_json(resolved), *run_config.script_numbers(resolved)
            )
        except errors.AlreadyExists as error:
            there = run_config.differences(run_config.from_json(error.metadata["config"]), resolved)
            error.message = (
                f"run_id = {run_id} exists with {there}; change what is live with UpdateRun "
                f"({', '.join(sorted(run_config.LIVE))}), use its settings, or choose another run_id"
            )
            raise
        return await self.get(run_id), bool(created[0])

    async def get(self, run_id: str) -> t.Run:
        """Reads a run; unknown: NotFound."""
        run_config.check_run_id(run_id)
        flat, sources, open_sources = await self._store.call(run_id, "get")
        return _run(run_id, pairs(flat), closed=sources > 0 and open_sources == 0)

    async def update(self, run_id: str, *, config: t.RunConfig, comment: str = "") -> t.Run:
        """Changes live settings; written to the run's audit log.

        Raises:
          InvalidArgument: a field is not live, or breaks a bound.
        """
        run_config.check_run_id(run_id)
        for _ in range(UPDATE_TRIES):
            flat, _, _ = await self._store.call(run_id, "get")
            before = pairs(flat)["config"]
            after = run_config.change(run_config.from_json(before), config)
            try:
                await self._store.call(
                    run_id,
                    "update",
                    before,
                    run_config.to_json(after),
                    comment[:1000],
                    *run_config.script_numbers(after),
                )
            except errors.FailedPrecondition as error:
                if error.reason != "CONFIG_RACE":
                    raise
                continue
            return await self.get(run_id)
        raise errors.Unavailable(
            f"run_id = {run_id}: its config keeps changing; try again", retry_after_s=1.0
        )

    async def log(self, run_id: str) -> list[dict[str, Any]]:
        """The audit log of configuration changes, oldest first."""
        return [json.loads(entry) for entry in (await self._store.call(run_id, "log"))[0]]


def pairs(flat: Sequence[bytes]) -> dict[str, str]:
    """A hash as the script returns it, as a dict."""
    texts = [x.decode() for x in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def _run(run_id: str, fields: Mapping[str, str], *, closed: bool) -> t.Run:
    def number(name: str) -> int:
        return int(fields.get(name, 0))

    live = sum(number(n) for n in ("waiting", "rolling", "ready", "assigned"))
    return t.Run(
        run_id=run_id,
        config=run_config.from_json(fields["config"]),
        created_at=datetime.fromtimestamp(number("created_ms") / 1000, UTC),
        committed_step=number("committed"),
        weight_version=number("pub_version"),
        weight_label=number("pub_label"),
        term=number("term"),
        trimmed_step=number("trimmed"),
        finished=closed and live == 0,
    )
