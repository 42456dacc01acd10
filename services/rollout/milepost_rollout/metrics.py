"""What the gateway tells: samples and groups by what became of them, rewards, and what it waits for.

    Sampler, GroupRoller, Settler --count--> Counters     SampleSlots, Gateway --looked at--> GatewayView

Everything is counted once a sample or once a group, next to milliseconds of work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from milepost_common.metrics import Instrument, Kind, Spec, Watched

SAMPLES = Spec(
    "milepost_samples",
    Kind.COUNTER,
    "samples that came to an end, by outcome",
    labels=("outcome",),
    unit="sample",
    when_bad="engine_error, reward_error, env_error: the gateway's log names the prompt; truncated: raise "
    "max_new_tokens, or see what the model rambles about",
)
TOKENS = Spec("milepost_tokens_generated", Kind.COUNTER, "tokens that engines generated", unit="token")
TRUNCATED = Spec(
    "rollout/truncated",
    Kind.GAUGE,
    "share of truncated samples among the last 256",
    when_bad="near 1 the model never finishes: rewards say little; raise max_new_tokens",
)
SAMPLE_SECONDS = Spec(
    "milepost_sample_seconds",
    Kind.HISTOGRAM,
    "time of a sample from its start to its last token, waits for a slot included",
    unit="s",
    when_bad="a long tail holds groups up: one engine is slow, or a few prompts are very long",
)
ASKS = Spec(
    "milepost_engine_asks",
    Kind.COUNTER,
    "requests to engines by result: answered, cut_short (an update or an abort; gone on with), away, failed, "
    "refused, timeout",
    labels=("result",),
    unit="request",
    when_bad="away: no engine serves; failed: engines break down; many cut_short: updates abort requests "
    "(pause_mode)",
)
SAMPLES_IN_FLIGHT = Spec(
    "milepost_samples_in_flight", Kind.GAUGE, "samples that are being generated", unit="sample"
)
SLOTS = Spec(
    "milepost_sample_slots",
    Kind.GAUGE,
    "slots at the engines: held, waited for, and how many there are (max_concurrent_samples)",
    labels=("state",),
    unit="slot",
    when_bad="held = limit with engines that could do more: raise max_concurrent_samples",
)
GROUPS_IN_FLIGHT = Spec(
    "milepost_groups_in_flight", Kind.GAUGE, "groups leased and not settled", unit="group"
)
SETTLED = Spec(
    "milepost_groups_settled",
    Kind.COUNTER,
    "groups by what became of them: sealed, duplicate, lease_lost, released, failed, dropped_<reason> ...",
    labels=("result",),
    unit="group",
    when_bad="failed: rolled again, up to max_attempts; lease_lost: the gateway was too slow to renew",
)
REWARD_SECONDS = Spec(
    "milepost_reward_seconds",
    Kind.HISTOGRAM,
    "time to score one group, by where: inline, worker, remote; waits for a worker included",
    labels=("where",),
    unit="s",
    when_bad="slow workers: raise reward_workers, or make the reward cheaper",
)
REWARD_ERRORS = Spec(
    "milepost_reward_errors",
    Kind.COUNTER,
    "samples whose reward raised, hung or was no number",
    labels=("where",),
    unit="sample",
    when_bad="any: the gateway's log has the message; such samples are never taken for zeros",
)
WAITING = Spec(
    "milepost_gateway_seconds",
    Kind.COUNTER,
    "seconds by what the gateway waited for: engines, ledger, prompts, run, resume (it is paused), nothing",
    labels=("waits_for",),
    unit="s",
    when_bad="engines, ledger: they are away; prompts: see milepost_waited_seconds for why there are none",
)
PAUSED = Spec("milepost_gateway_paused", Kind.GAUGE, "1 while the gateway leases no prompts by order")
EVALUATION_REWARD = Spec(
    "milepost_evaluation_reward", Kind.GAUGE, "mean reward of the last evaluation of held-out prompts"
)
EVALUATION_LABEL = Spec(
    "milepost_evaluation_label", Kind.GAUGE, "step whose weights the last evaluation was of", unit="step"
)
SPECS = (
    SAMPLES, TOKENS, TRUNCATED, SAMPLE_SECONDS, ASKS, SAMPLES_IN_FLIGHT, SLOTS, GROUPS_IN_FLIGHT, SETTLED,
    REWARD_SECONDS, REWARD_ERRORS, WAITING, PAUSED, EVALUATION_REWARD, EVALUATION_LABEL,
)  # fmt: skip

RESULTS = ("answered", "cut_short", "away", "failed", "refused", "timeout")
NOTHING = "nothing"


def one(spec: Spec, look: Callable[[], float]) -> Instrument:
    """A single number that somebody keeps; NaN while there is none."""

    def read() -> Iterable[tuple[tuple[str, ...], float]]:
        value = look()
        return [] if math.isnan(value) else [((), value)]

    return Watched(spec, read)
