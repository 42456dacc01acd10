"""The CPU engine's metrics, from a scheduler that generates."""

from __future__ import annotations

import threading

import pytest

from milepost_engine.metrics import SPECS, SchedulerView
from milepost_engine.runner import ModelRunner
from milepost_engine.scheduler import Scheduler

DEADLINE_S = 60.0


class Counting:
    """A scheduler, its view on a clock of the test's, and a wait for what ends."""

    def __init__(self, model):
        self.now = [0.0]
        self._ended = []
        self._changed = threading.Condition()
        self.scheduler = Scheduler(
            ModelRunner(model, max_slots=4),
            max_running=4,
            max_prefill_tokens=64,
            seed=0,
            weight_version="v0",
            notify=self._notify,
            on_death=lambda error: None,
        )
        view = SchedulerView(self.scheduler, model="m", max_tokens=100, clock=lambda: self.now[0])
        self._instruments = view.instruments
        self.scheduler.start()

    def _notify(self, generations):
        with self._changed:
            self._ended += [g for g in generations if g.finish]
            self._changed.notify_all()

    def wait_ended(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._ended) >= count, DEADLINE_S)

    def read(self):
        return {i.spec.name: value for i in self._instruments for _, value in i.read()}

    def do(self, function):
        return self.scheduler.call(function).result(DEADLINE_S)


@pytest.fixture
def counting(tiny_model):
    made = Counting(tiny_model)
    yield made
    assert made.scheduler.stop(timeout_s=DEADLINE_S)


def test_tokens_and_requests_are_counted(counting, new_generation):
    counting.scheduler.submit([new_generation([1, 2, 3], max_new_tokens=4) for _ in range(2)])
    counting.wait_ended(2)
    got = counting.read()
    assert got["sglang:num_requests"] == 2
    assert got["sglang:prompt_tokens"] == 6
    assert got["sglang:cached_tokens"] == 3, "the second prompt was computed with the first"
    assert got["sglang:generation_tokens"] == 8
    assert sum(got["sglang:e2e_request_latency_seconds"].counts) == 2
    assert (got["sglang:num_running_reqs"], got["sglang:num_used_tokens"]) == (0, 0)
    assert got["sglang:num_aborted_requests"] == 0


def test_a_pause_shows_who_runs_who_waits_and_what_is_held(counting, new_generation):
    scheduler = counting.scheduler
    counting.do(lambda: scheduler.pause("in_place"))
    scheduler.submit([new_generation([1, 2], max_new_tokens=4)])
    got = counting.do(counting.read)
    assert got["milepost_cpu_engine_paused"] == 1
    assert (got["sglang:num_queue_reqs"], got["sglang:num_running_reqs"]) == (1, 0)
    counting.do(lambda: scheduler.abort(everything=True))
    counting.do(scheduler.resume)
    got = counting.read()
    assert (got["sglang:num_aborted_requests"], got["sglang:num_requests"]) == (1, 1)
    assert (got["sglang:num_queue_reqs"], got["milepost_cpu_engine_paused"]) == (0, 0)


def test_throughput_is_what_was_generated_between_two_readings(counting, new_generation):
    counting.scheduler.submit([new_generation([1, 2], max_new_tokens=10)])
    counting.wait_ended(1)
    counting.now[0] = 0.5
    assert counting.read()["sglang:gen_throughput"] == 0, "too soon to tell"
    counting.now[0] = 2.0
    assert counting.read()["sglang:gen_throughput"] == 5
    counting.now[0] = 2.1
    assert counting.read()["sglang:gen_throughput"] == 5
    counting.now[0] = 4.0
    assert counting.read()["sglang:gen_throughput"] == 0


def test_names_are_sglangs_or_ours():
    assert all(s.name.startswith(("sglang:", "milepost_")) for s in SPECS)
    assert all(s.labels == ("model_name",) for s in SPECS if s.name.startswith("sglang:"))
