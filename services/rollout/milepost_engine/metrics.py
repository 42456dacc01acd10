"""What the CPU engine tells, under SGLang's names for the same things, so that one dashboard reads both.

The scheduler's thread counts with plain numbers; they are looked at when somebody asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from milepost_common.metrics import Histogram, Instrument, Kind, Spec, Watched
from milepost_engine.scheduler import Scheduler

_MODEL = ("model_name",)


def _spec(name: str, kind: Kind, means: str, *, unit: str = "1", when_bad: str = "") -> Spec:
    return Spec(name, kind, means, labels=_MODEL, unit=unit, when_bad=when_bad)


RUNNING = _spec("sglang:num_running_reqs", Kind.GAUGE, "requests in the running batch", unit="request")
QUEUED = _spec(
    "sglang:num_queue_reqs",
    Kind.GAUGE,
    "requests that wait for a place in it",
    unit="request",
    when_bad="above 0 for long: the engine is full; more engines, or fewer samples in flight",
)
USED_TOKENS = _spec("sglang:num_used_tokens", Kind.GAUGE, "tokens whose KV is held", unit="token")
TOKEN_USAGE = _spec("sglang:token_usage", Kind.GAUGE, "share of the tokens whose KV could be held")
THROUGHPUT = _spec(
    "sglang:gen_throughput",
    Kind.GAUGE,
    "tokens generated a second, between two readings at least a second apart",
    unit="token/s",
    when_bad="far below its usual value with requests running: the machine is short of CPU",
)
PROMPT_TOKENS = _spec("sglang:prompt_tokens", Kind.COUNTER, "tokens of prompts", unit="token")
CACHED_TOKENS = _spec(
    "sglang:cached_tokens", Kind.COUNTER, "tokens of prompts that were not computed again", unit="token"
)
GENERATED = _spec("sglang:generation_tokens", Kind.COUNTER, "tokens generated", unit="token")
REQUESTS = _spec("sglang:num_requests", Kind.COUNTER, "requests that ended", unit="request")
ABORTED = _spec(
    "sglang:num_aborted_requests",
    Kind.COUNTER,
    "requests that were ended before their time",
    unit="request",
    when_bad="a rate: clients leave, updates abort (pause_mode), or the router takes requests away",
)
LATENCY = _spec(
    "sglang:e2e_request_latency_seconds",
    Kind.HISTOGRAM,
    "time of requests from their arrival to their last token",
    unit="s",
)
PAUSED = Spec(
    "milepost_cpu_engine_paused",
    Kind.GAUGE,
    "1 while the engine makes no forward passes, for a weight update or by order",
    when_bad="1 for more than a publication: whoever paused it is gone; the router resumes it when it looks",
)
KV_BYTES = Spec("milepost_cpu_engine_kv_bytes", Kind.GAUGE, "bytes of the KV cache", unit="By")
SPECS = (
    RUNNING, QUEUED, USED_TOKENS, TOKEN_USAGE, THROUGHPUT, PROMPT_TOKENS, CACHED_TOKENS, GENERATED, REQUESTS,
    ABORTED, LATENCY, PAUSED, KV_BYTES,
)  # fmt: skip

_RATE_OVER_S = 1.0


class SchedulerView:
    """A scheduler, looked at.

    Args:
      scheduler: whose numbers.
      model: name of the model, the label.
      max_tokens: tokens whose KV it could hold.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        model: str,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler, self._labels, self._max_tokens = scheduler, (model,), max(1, max_tokens)
        self._clock = clock
        self._mark = (clock(), scheduler.tokens_generated)
        self._rate = 0.0

    @property
    def instruments(self) -> tuple[Instrument, ...]:
        """What it tells."""
        s = self._scheduler
        looks: dict[Spec, Callable[[], float]] = {
            RUNNING: lambda: len(s.running),
            QUEUED: lambda: len(s.waiting),
            USED_TOKENS: self._used_tokens,
            TOKEN_USAGE: lambda: self._used_tokens() / self._max_tokens,
            THROUGHPUT: self._throughput,
            PROMPT_TOKENS: lambda: s.prompt_tokens,
            CACHED_TOKENS: lambda: s.cached_tokens,
            GENERATED: lambda: s.tokens_generated,
            REQUESTS: lambda: s.num_ended,
            ABORTED: lambda: s.num_aborted,
        }
        own = (
            Watched(PAUSED, lambda: [((), float(s.paused))]),
            Watched(KV_BYTES, lambda: [((), s.runner.cache.size_bytes)]),
        )
        return (*(self._watched(spec, look) for spec, look in looks.items()), *own, self._latency())

    def _watched(self, spec: Spec, look: Callable[[], float]) -> Watched:
        return Watched(spec, lambda: [(self._labels, look())])

    def _latency(self) -> Histogram:
        histogram = Histogram(LATENCY)
        self._scheduler.on_ended = histogram.series(*self._labels).record
        return histogram

    def _used_tokens(self) -> int:
        return sum(len(g.prompt_ids) + len(g.output_ids) for g in self._scheduler.running.copy())

    def _throughput(self) -> float:
        (since, before), now = self._mark, self._clock()
        if now - since >= _RATE_OVER_S:
            tokens = self._scheduler.tokens_generated
            self._rate, self._mark = (tokens - before) / (now - since), (now, tokens)
        return self._rate
