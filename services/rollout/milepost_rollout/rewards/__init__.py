"""Rewards: what a sample is worth, by name, each with a time-out and none on the event loop.

    "exact"               response equals label, both stripped               in the gateway: cheap
    "math"                response and label mean the same, by math-verify   in a worker
    "regex:PATTERN"       first group equals label; no group: it matches     in a worker
    "module:function"     the user's Python: sync or async, sample or group  in a worker
    "grpc://host:port"    a RewardService in any language                    over the network

A function takes one `RewardSample` and returns a number; when its parameter is named `samples` it takes the
list of all samples of a prompt and returns as many numbers. Instead of a number it may return a mapping with
the key `reward`, whose other numbers become named parts.

    def near(sample):                          # one sample
        return 1.0 if sample.response.strip() == sample.label else 0.0

    async def ranked(samples):                 # the whole group
        return [1.0 / (1 + len(s.response)) for s in samples]

What raises, hangs or returns something else than a finite number is the outcome REWARD_ERROR of that sample,
never a zero.
"""

from __future__ import annotations

from milepost_rollout.rewards.contract import RewardSample, Score

__all__ = ["RewardSample", "Score"]
