"""The scheduler's thread: queueing, pauses, aborts, its end and its death."""

from __future__ import annotations

import threading

import pytest
import torch

from milepost_engine.errors import InvalidRequest, Unavailable
from milepost_engine.generation import LogprobOptions
from milepost_engine.runner import ModelRunner
from milepost_engine.scheduler import Scheduler

DEADLINE_S = 60.0


class Harness:
    """A scheduler whose notices are collected, with waits that have deadlines."""

    def __init__(self, runner, **options):
        self.finished = []
        self.deaths = []
        self._changed = threading.Condition()
        settings = {"max_running": 4, "max_prefill_tokens": 64, "seed": 0, "weight_version": "v0"}
        self.scheduler = Scheduler(
            runner, **(settings | options), notify=self._notify, on_death=self.deaths.append
        )
        self.scheduler.start()

    def _notify(self, generations):
        with self._changed:
            self.finished += [generation for generation in generations if generation.finish]
            self._changed.notify_all()

    def wait_finished(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.finished) >= count, DEADLINE_S)

    def do(self, function):
        return self.scheduler.call(function).result(DEADLINE_S)


@pytest.fixture
def harness(tiny_model):
    started = []

    def start(runner=None, **options):
        started.append(Harness(runner or ModelRunner(tiny_model, max_slots=4), **options))
        return started[-1]

    yield start
    for each in started:
        assert each.scheduler.stop(timeout_s=DEADLINE_S)


def test_more_generations_than_rows_all_finish_in_order_of_arrival(harness, new_generation):
    h = harness()
    generations = [new_generation([1 + i % 5], max_new_tokens=3) for i in range(19)]
    h.scheduler.submit(generations)
    h.wait_finished(19)
    assert h.finished == generations
    assert all(len(g.output_ids) == len(g.output_logprobs) == 3 for g in generations)
    assert h.do(h.scheduler.stats)["tokens_generated"] == 57


def test_a_paused_scheduler_keeps_what_it_has_and_answers_calls(harness, new_generation):
    h = harness()
    h.do(lambda: h.scheduler.pause("in_place"))
    waiting = new_generation([1])
    h.scheduler.submit([waiting])
    assert h.do(lambda: h.scheduler.num_live) == 1
    assert h.do(lambda: h.scheduler.can_flush)
    h.do(h.scheduler.resume)
    h.wait_finished(1)
    assert waiting.finish.to_json() == {"type": "length", "length": 8}


def test_retracted_generations_keep_their_order_and_their_tokens(tiny_model, new_generation):
    """Driven without the thread: two steps, a retract, and the steps after it."""
    scheduler = Scheduler(
        ModelRunner(tiny_model, max_slots=2),
        max_running=2,
        max_prefill_tokens=64,
        seed=0,
        weight_version="v0",
        notify=lambda _: None,
        on_death=lambda _: None,
    )
    undisturbed = [new_generation([3, 4], temperature=0.0), new_generation([5], temperature=0.0)]
    disturbed = [new_generation([3, 4], temperature=0.0), new_generation([5], temperature=0.0)]
    late = new_generation([7], temperature=0.0)
    for batch, retracts in ((undisturbed, False), ([*disturbed, late], True)):
        scheduler.waiting.extend(batch)
        for step in range(40):
            if retracts and step in (2, 4):
                scheduler.retract()
                assert list(scheduler.waiting) == [*disturbed, late]
                assert scheduler.runner.cache.count == 0
                assert all(len(g.output_ids) > 0 for g in disturbed)
            scheduler._step()
    assert [g.output_ids for g in disturbed] == [g.output_ids for g in undisturbed]
    assert len(late.output_ids) == 8
    assert scheduler.running == []


def test_identical_prompts_are_prefilled_once(tiny_model, new_generation):
    runner = ModelRunner(tiny_model, max_slots=4)
    prompts = []
    prefill = runner.prefill
    runner.prefill = lambda p, **options: prompts.append(p) or prefill(p, **options)
    scheduler = Scheduler(
        runner,
        max_running=4,
        max_prefill_tokens=64,
        seed=0,
        weight_version="v0",
        notify=lambda _: None,
        on_death=lambda _: None,
    )
    shared = [2, 3, 4]
    group = [new_generation(shared) for _ in range(3)]
    scheduler.waiting.extend(group)
    scheduler._step()
    assert prompts == [[shared]]
    assert [g.cached_tokens for g in group] == [0, 3, 3]


def test_abort_by_prefix_reaches_running_and_waiting(harness, new_generation):
    h = harness(max_running=2)
    h.do(lambda: h.scheduler.pause("in_place"))
    mine = [new_generation([1], rid=f"mine_{i}") for i in range(3)]
    other = new_generation([1], rid="other")
    h.scheduler.submit([*mine, other])
    assert h.do(lambda: h.scheduler.abort(rid="mine")) == 3
    h.wait_finished(3)
    assert all(g.finish.to_json()["type"] == "abort" for g in mine)
    assert h.do(lambda: h.scheduler.num_live) == 1
    h.do(h.scheduler.resume)
    h.wait_finished(4)
    assert other.finish.kind == "length"


def test_versions_are_marked_only_where_tokens_stand(harness, new_generation):
    h = harness()
    h.do(lambda: h.scheduler.pause("in_place"))
    queued = new_generation([1])
    h.scheduler.submit([queued])
    h.do(lambda: h.scheduler.set_weight_version("v1"))
    h.do(h.scheduler.resume)
    h.wait_finished(1)
    assert queued.version_marks == []
    assert queued.final_version == "v1"


def test_prompt_logprobs_without_output(harness, new_generation):
    h = harness()
    options = LogprobOptions(wanted=True, start_len=0)
    scored = new_generation([1, 2, 3], max_new_tokens=0, logprobs=options)
    plain = new_generation([1, 2, 3], max_new_tokens=0)
    h.scheduler.submit([scored, plain])
    h.wait_finished(2)
    assert scored.output_ids == plain.output_ids == []
    assert scored.input_logprobs[0] is None
    assert len(scored.input_logprobs) == 3
    assert plain.finish.to_json() == {"type": "length", "length": 0}


def test_kv_is_not_released_under_running_requests(tiny_model, new_generation):
    scheduler = Scheduler(
        ModelRunner(tiny_model, max_slots=2),
        max_running=2,
        max_prefill_tokens=64,
        seed=0,
        weight_version="v0",
        notify=lambda _: None,
        on_death=lambda _: None,
    )
    scheduler.waiting.append(new_generation([1]))
    scheduler._step()
    assert not scheduler.can_flush
    with pytest.raises(InvalidRequest, match="1 requests run"):
        scheduler.release_kv()
    scheduler.pause("retract")
    assert scheduler.can_flush
    scheduler.release_kv()


def test_a_call_that_raises_is_its_callers_and_the_thread_lives(harness, new_generation):
    h = harness()

    def fail():
        raise KeyError("mine")

    with pytest.raises(KeyError):
        h.do(fail)
    h.scheduler.submit([new_generation([1])])
    h.wait_finished(1)


def test_stop_answers_everyone_and_refuses_what_follows(harness, new_generation):
    h = harness()
    h.do(lambda: h.scheduler.pause("in_place"))
    left = [new_generation([1]) for _ in range(3)]
    h.scheduler.submit(left)
    assert h.scheduler.stop(timeout_s=DEADLINE_S)
    assert [g.finish.kind for g in left] == ["abort"] * 3
    assert h.finished == left
    assert not h.scheduler.alive
    with pytest.raises(Unavailable):
        h.scheduler.submit([new_generation([1])])
    with pytest.raises(Unavailable):
        h.do(lambda: None)
    assert h.deaths == []


@pytest.mark.parametrize("dies_at", ["prefill", "decode"])
def test_a_forward_pass_that_fails_kills_the_thread_and_nobody_is_left_waiting(
    harness, new_generation, tiny_model, dies_at
):
    """Rows that run, rows just admitted and requests in the queue all end once, as aborted."""
    runner = ModelRunner(tiny_model, max_slots=2)
    original, calls = getattr(runner, dies_at), []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) >= 2:
            raise RuntimeError("out of luck")
        return original(*args, **options)

    setattr(runner, dies_at, failing)
    h = harness(runner, max_running=2)
    generations = [new_generation([1, 2], max_new_tokens=5 + 9 * (i % 2)) for i in range(5)]
    h.scheduler.submit(generations)
    h.wait_finished(5)
    assert len(h.finished) == 5
    assert len({id(g) for g in h.finished}) == 5
    assert all(g.finish is not None for g in generations)
    assert any(g.finish.kind == "abort" for g in generations)
    assert h.scheduler.stop(timeout_s=DEADLINE_S)
    assert [str(error) for error in h.deaths] == ["out of luck"]
    assert not h.scheduler.alive


def test_seeded_generations_do_not_depend_on_the_schedule(harness, new_generation):
    def run(rows):
        h = harness(max_running=rows)
        generations = [new_generation([1, 2], sampling_seed=i, max_new_tokens=12) for i in range(6)]
        for generation in generations:
            generation.generator = torch.Generator().manual_seed(generation.params.sampling_seed)
        h.scheduler.submit(generations)
        h.wait_finished(6)
        return [generation.output_ids for generation in generations]

    assert run(1) == run(4)
