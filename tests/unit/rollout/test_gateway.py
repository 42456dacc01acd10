"""The gateway's loops against a ledger and a roller that do as they are told."""

# ruff: noqa: ASYNC110  # polled with a deadline: what is waited for has no event of its own

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from milepost.convert import open_group
from milepost.errors import InvalidArgument, NotFound, Unavailable
from milepost.types import (
    DropReason,
    ErrorPolicy,
    Group,
    LeaseKey,
    Outcome,
    Prompt,
    PromptLease,
    PromptLeases,
    ReleaseResult,
    RenewedLeases,
    Run,
    RunConfig,
    Sample,
    SealResult,
    SealStatus,
    VersionSpan,
)
from milepost_rollout.gateway import Gateway, GatewaySettings
from milepost_rollout.roller import RollRequest
from milepost_rollout.sampler import EnginesUnavailable
from milepost_rollout.status import Counters


class FakeLedger:
    """Leases the prompts it is given; keeps what came back. `changed` is set at each call that changes it."""

    def __init__(self, **config: Any) -> None:
        self.config = RunConfig(**{"samples_per_prompt": 2, "lease_ttl_s": 0.15, "reward": "exact", **config})
        self.waiting: list[str] = []
        self.asked: list[int] = []
        self.sealed: dict[str, Group] = {}
        self.released: list[dict[str, Any]] = []
        self.renewed: list[set[str]] = []
        self.lost: set[str] = set()
        self.lost_answers: list[str] = []
        self.unheard: set[LeaseKey] = set()
        self.unnamed: set[LeaseKey] = set()
        self.get_run_errors: list[Exception] = []
        self.changed = asyncio.Condition()
        self.attempt = 0

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def put(self, *prompt_ids: str) -> None:
        self.waiting += prompt_ids
        await self._notify()

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(30), self.changed:
            await self.changed.wait_for(condition)

    async def get_run(self, run_id: str) -> Run:
        if self.get_run_errors:
            raise self.get_run_errors.pop(0)
        return Run(run_id=run_id, config=self.config)

    async def lease_prompts(self, run_id: str, *, max_prompts: int, **who: Any) -> PromptLeases:
        self.asked.append(max_prompts)
        await self._notify()
        async with self.changed:
            await self.changed.wait_for(lambda: self.waiting)
        ids, self.waiting = self.waiting[:max_prompts], self.waiting[max_prompts:]
        self.attempt += 1
        if ids[0] in self.lost_answers:
            self.lost_answers.remove(ids[0])
            self.unheard = {LeaseKey(prompt_id=i, attempt=self.attempt) for i in ids}
            raise Unavailable("the connection broke")
        leases = [
            PromptLease(
                prompt=Prompt(prompt_id=i, text=i, label="x"),
                attempt=self.attempt,
                min_version=3,
                ttl_s=self.config.lease_ttl_s or 0,
                num_samples=self.config.samples_per_prompt or 0,
            )
            for i in ids
        ]
        return PromptLeases(leases=tuple(leases), reason="no prompts")

    async def renew_leases(
        self, run_id: str, *, instance_id: str, leases: Iterable[LeaseKey], names_all: bool = False
    ) -> RenewedLeases:
        keys = list(leases)
        self.renewed.append({k.prompt_id for k in keys})
        await self._notify()
        unnamed = tuple(self.unnamed - set(keys)) if names_all else ()
        return RenewedLeases(
            lost=tuple(k for k in keys if k.prompt_id in self.lost), ttl_s=1.0, unnamed=unnamed
        )

    async def put_groups(self, run_id: str, *, groups: Sequence[Group]) -> tuple[SealResult, ...]:
        self.sealed.update({g.header.prompt_id: g for g in groups})
        await self._notify()
        return tuple(SealResult(prompt_id=g.header.prompt_id, status=SealStatus.SEALED) for g in groups)

    async def release_prompts(
        self, run_id: str, *, instance_id: str, leases: Iterable[LeaseKey], **how: Any
    ) -> ReleaseResult:
        keys = list(leases)
        self.released.append({"ids": [k.prompt_id for k in keys], **how})
        self.unnamed -= set(keys)
        await self._notify()
        return ReleaseResult()

    def name_unheard(self) -> None:
        """From now on renewals tell of the leases whose answer was lost."""
        self.unnamed = set(self.unheard)

    @property
    def given_back(self) -> set[str]:
        return {i for r in self.released for i in r["ids"]}


def sample(index: int, outcome: Outcome = Outcome.COMPLETED) -> Sample:
    return Sample(
        index=index,
        tokens=np.array([1, 2], np.int32),
        loss_mask=np.array([0, 0 if outcome.is_error else 1], np.uint8),
        logprobs=np.array([0, -1], np.float32),
        prompt_length=1,
        version_spans=(VersionSpan(start=1, end=2, weight_version=3),),
        outcome=outcome,
        reward=float("nan") if outcome.is_error else 1.0,
        error="broke" if outcome.is_error else "",
    )


class FakeRoller:
    """Rolls a prompt out when its gate opens; `results` may hold samples or an error for it."""

    def __init__(self) -> None:
        self.requests: dict[str, RollRequest] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.results: dict[str, Any] = {}
        self.cancelled: set[str] = set()
        self.open = True
        self.generated_before_gate = False

    def gate(self, prompt_id: str) -> asyncio.Event:
        return self.gates.setdefault(prompt_id, asyncio.Event())

    async def roll(self, request: RollRequest, *, on_generated: Callable[[], None]) -> tuple[Sample, ...]:
        prompt_id = request.prompt.prompt_id
        self.requests[prompt_id] = request
        if self.generated_before_gate:
            for _ in range(request.num_samples):
                on_generated()
        try:
            if not self.open:
                await self.gate(prompt_id).wait()
        except asyncio.CancelledError:
            self.cancelled.add(prompt_id)
            raise
        result = self.results.get(prompt_id)
        if isinstance(result, Exception):
            raise result
        return result or tuple(sample(i) for i in range(request.num_samples))


class Setup:
    def __init__(self, *, max_concurrent_samples: int = 8, drain_s: float = 5.0, **config: Any) -> None:
        self.ledger = FakeLedger(**config)
        self.roller = FakeRoller()
        self.counters = Counters()
        self.stop = asyncio.Event()
        self.checked: list[str] = []
        self.gateway = Gateway(
            self.ledger,
            roller=self.roller,  # type: ignore[arg-type]
            settings=GatewaySettings(
                run_id="r",
                gateway_id="g",
                instance_id="i",
                max_concurrent_samples=max_concurrent_samples,
                drain_s=drain_s,
            ),
            counters=self.counters,
            check_reward=self.check,
        )

    async def check(self, name: str) -> None:
        self.checked.append(name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.gateway.run(self.stop))
        try:
            yield task
            self.stop.set()
            async with asyncio.timeout(30):
                await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_leased_prompts_are_sealed():
    s = Setup()
    async with s.running():
        await s.ledger.put("a", "b", "c")
        await s.ledger.until(lambda: len(s.ledger.sealed) == 3)
    group = s.ledger.sealed["a"]
    assert group.header.attempt == 1
    assert group.header.rewards == (1.0, 1.0)
    assert group.header.weight_versions == (3,)
    payload = open_group(group.payload)
    assert payload.prompt.label == "x"
    assert [x.index for x in payload.samples] == [0, 1]
    request = s.roller.requests["a"]
    assert (request.run_id, request.min_version, request.num_samples, request.reward) == ("r", 3, 2, "exact")
    assert request.fail_fast
    assert s.checked == ["exact"]
    assert s.gateway.groups_in_flight == 0


async def test_leases_are_taken_only_while_there_is_room():
    s = Setup(max_concurrent_samples=4)
    s.roller.open = False
    async with s.running():
        await s.ledger.put("a", "b", "c")
        await s.ledger.until(lambda: s.ledger.asked)
        assert s.ledger.asked == [2]
        while len(s.roller.requests) < 2:
            await asyncio.sleep(0)
        s.roller.gate("a").set()
        await s.ledger.until(lambda: len(s.ledger.asked) == 2)
        assert s.ledger.asked[1] == 1
        for i in "bc":
            s.roller.gate(i).set()
        await s.ledger.until(lambda: len(s.ledger.sealed) == 3)


async def test_generated_samples_make_room_while_their_group_is_scored():
    s = Setup(max_concurrent_samples=4)
    s.roller.open, s.roller.generated_before_gate = False, True
    async with s.running():
        await s.ledger.put("a", "b", "c", "d")
        async with asyncio.timeout(30):
            while len(s.roller.requests) < 4:
                await asyncio.sleep(0.001)
        for i in "abcd":
            s.roller.gate(i).set()
        await s.ledger.until(lambda: len(s.ledger.sealed) == 4)


async def test_a_group_larger_than_the_room_is_leased_alone():
    s = Setup(max_concurrent_samples=1)
    async with s.running():
        await s.ledger.put("a", "b")
        await s.ledger.until(lambda: len(s.ledger.sealed) == 2)
    assert set(s.ledger.asked) == {1}


async def test_pause_and_resume():
    s = Setup()
    s.gateway.pause()
    async with s.running() as task:
        await s.ledger.put("a")
        for _ in range(200):
            await asyncio.sleep(0)
        assert s.ledger.asked == []
        assert "paused" in s.counters.waiting_for
        s.gateway.resume()
        await s.ledger.until(lambda: "a" in s.ledger.sealed)
        assert not task.done()


async def test_what_a_call_brings_after_the_pause_is_given_back():
    s = Setup()
    async with s.running():
        await s.ledger.until(lambda: len(s.ledger.asked) == 1)
        s.gateway.pause()
        await s.ledger.put("a", "b")
        await s.ledger.until(lambda: s.ledger.given_back == {"a", "b"})
        assert not s.roller.requests
        s.gateway.resume()
        await s.ledger.put("c")
        await s.ledger.until(lambda: "c" in s.ledger.sealed)
    assert set(s.ledger.sealed) == {"c"}


async def test_leases_are_renewed_and_lost_ones_are_cancelled():
    s = Setup()
    s.roller.open = False
    async with s.running():
        await s.ledger.put("kept", "lost")
        await s.ledger.until(lambda: s.ledger.renewed and s.ledger.renewed[-1] == {"kept", "lost"})
        s.ledger.lost = {"lost"}
        await s.ledger.until(lambda: s.ledger.renewed[-1] == {"kept"})
        assert s.roller.cancelled == {"lost"}
        s.roller.gate("kept").set()
        await s.ledger.until(lambda: "kept" in s.ledger.sealed)
    assert "lost" not in s.ledger.sealed
    assert "lost" not in s.ledger.given_back
    assert s.counters.settled["lease_lost"] == 1


async def test_a_lease_whose_answer_was_lost_is_given_back_and_does_not_count():
    s = Setup()
    s.ledger.lost_answers = ["a"]
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: len(s.ledger.asked) == 2)
        s.ledger.name_unheard()
        await s.ledger.until(lambda: {"a"} in s.ledger.renewed)
        assert not s.ledger.released, "the call under way may bring it yet"
        await s.ledger.put("b")
        await s.ledger.until(lambda: s.ledger.released and "b" in s.ledger.sealed)
        (how,) = s.ledger.released
        assert (how["ids"], how["drop_reason"], how["failed"]) == (["a"], DropReason.UNSPECIFIED, False)
        await s.ledger.put("a")
        await s.ledger.until(lambda: "a" in s.ledger.sealed)
    assert len(s.ledger.released) == 1


async def test_a_prompt_that_cannot_be_rolled_out_is_dropped():
    s = Setup()
    s.roller.results["a"] = InvalidArgument("prompt: 9 tokens leave no room in the context of 8")
    async with s.running():
        await s.ledger.put("a", "b")
        await s.ledger.until(lambda: s.ledger.released and "b" in s.ledger.sealed)
    (how,) = s.ledger.released
    assert (how["ids"], how["drop_reason"], how["failed"]) == (["a"], DropReason.INVALID, False)
    assert "9 tokens" in how["detail"]


async def test_engines_that_are_away_do_not_count_against_the_prompt():
    s = Setup()
    s.roller.results["a"] = EnginesUnavailable("nobody there")
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: s.ledger.released)
    (how,) = s.ledger.released
    assert (how["drop_reason"], how["failed"]) == (DropReason.UNSPECIFIED, False)


async def test_a_failed_sample_follows_the_runs_policy():
    s = Setup(error_policy=ErrorPolicy.DROP)
    s.roller.results["a"] = (sample(0), sample(1, Outcome.REWARD_ERROR))
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: s.ledger.released)
    assert s.ledger.released[0]["drop_reason"] is DropReason.REWARD_ERROR
    assert s.ledger.sealed == {}


async def test_a_defect_gives_the_prompt_back_as_failed():
    s = Setup()
    s.roller.results["a"] = RuntimeError("oops")
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: s.ledger.released)
    assert s.ledger.released[0]["failed"] is True
    assert "oops" in s.ledger.released[0]["detail"]


async def test_stop_finishes_what_it_can_and_gives_the_rest_back():
    s = Setup(drain_s=0.2)
    s.roller.open = False
    async with s.running():
        await s.ledger.put("done", "stuck")
        await s.ledger.until(lambda: s.ledger.renewed and len(s.ledger.renewed[-1]) == 2)
        s.roller.gate("done").set()
    assert set(s.ledger.sealed) == {"done"}
    assert s.ledger.given_back == {"stuck"}
    assert s.ledger.released[-1]["failed"] is False
    assert s.roller.cancelled == {"stuck"}
    assert s.gateway.groups_in_flight == 0


async def test_it_waits_for_a_run_that_does_not_exist_yet():
    s = Setup()
    s.ledger.get_run_errors = [NotFound("no run r"), Unavailable("redis is away")]
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: "a" in s.ledger.sealed)


async def test_it_stops_while_it_waits_for_the_run():
    s = Setup()
    s.ledger.get_run_errors = [NotFound("no run r")] * 1000
    async with s.running():
        async with asyncio.timeout(30):
            while "does not exist" not in s.counters.waiting_for:
                await asyncio.sleep(0)
    assert s.ledger.asked == []


async def test_a_reward_that_cannot_be_used_ends_it_before_anything_is_leased():
    s = Setup()

    async def refuse(name: str) -> None:
        raise InvalidArgument(f"reward {name!r}: there is no module")

    s.gateway._check_reward = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidArgument, match="no module"):
        await s.gateway.run(s.stop)
    assert s.ledger.asked == []


async def test_a_ledger_that_is_away_is_asked_again():
    s = Setup()
    leases, fail = s.ledger.lease_prompts, [Unavailable("away", retry_after_s=0.001)] * 2

    async def flaky(*args: Any, **kwargs: Any) -> PromptLeases:
        if fail:
            raise fail.pop()
        return await leases(*args, **kwargs)

    s.ledger.lease_prompts = flaky  # type: ignore[method-assign]
    async with s.running():
        await s.ledger.put("a")
        await s.ledger.until(lambda: "a" in s.ledger.sealed)
