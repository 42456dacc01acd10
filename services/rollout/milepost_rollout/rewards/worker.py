"""A process that runs rewards and may be killed: `python -m milepost_rollout.rewards.worker [FOLDER ...]`.

Protocol: frames of a 4-byte little-endian length and that many bytes of JSON, on the descriptors that stdin
and stdout were at the start (afterwards stdin is empty and stdout is stderr, so that a reward may print). One
job at a time:

    in   {"reward": name, "samples": [RewardSample ...], "timeout_s": t}
    out  {"loaded": true, "in_order": b}  or  {"refused": message}, which ends the job
    out  {"index": i, "reward": x, "parts": {...}}  or  {"index": i, "error": message}, once for each sample
    out  {"done": true}

`i` counts the samples of the job from 0. `in_order` is true where the function takes one sample after the
other: the parent then knows at which one a silent worker stands. The worker ends with its parent.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

from milepost_common.process import die_with_parent
from milepost_rollout.rewards.contract import BadReward, RewardSample, Score, read_score
from milepost_rollout.rewards.functions import CannotLoad, RewardFunction, load

_LENGTH = struct.Struct("<I")


class Worker:
    """Answers jobs until its input ends. Owns the functions loaded and one event loop for async ones."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._functions: dict[str, RewardFunction] = {}
        self._runner = asyncio.Runner()

    def run(self) -> None:
        """Serves until end of input."""
        with self._runner:
            while (job := self._read()) is not None:
                self._serve(job)

    def _serve(self, job: dict[str, Any]) -> None:
        name = job["reward"]
        try:
            function = self._functions.get(name) or load(name)
        except CannotLoad as error:
            self._write({"refused": str(error)})
            return
        self._functions[name] = function
        self._write({"loaded": True, "in_order": not (function.per_group or function.is_async)})
        samples = [_sample(s) for s in job["samples"]]
        if function.per_group:
            self._score_group(name, function, samples, job["timeout_s"])
        elif function.is_async:
            self._runner.run(self._score_together(name, function, samples, job["timeout_s"]))
        else:
            for i, sample in enumerate(samples):
                self._answer(i, self._score_one(name, function, sample))
        self._write({"done": True})

    def _score_one(self, name: str, function: RewardFunction, sample: RewardSample) -> Score:
        try:
            return read_score(self._settled(function.call(sample)))
        except Exception as error:
            return Score(error=_explain(name, sample.prompt_id, error))

    def _settled(self, value: Any) -> Any:
        """Awaits what turned out to be awaitable, for example from a decorated function."""
        if not inspect.isawaitable(value):
            return value

        async def awaited() -> Any:
            return await value

        return self._runner.run(awaited())

    async def _score_together(
        self, name: str, function: RewardFunction, samples: Sequence[RewardSample], timeout_s: float
    ) -> None:
        async def one(i: int, sample: RewardSample) -> None:
            try:
                score = read_score(await asyncio.wait_for(function.call(sample), timeout_s))
            except TimeoutError as error:
                score = Score(error=_explain(name, sample.prompt_id, error, timeout_s))
            except Exception as error:
                score = Score(error=_explain(name, sample.prompt_id, error))
            self._answer(i, score)

        await asyncio.gather(*(one(i, s) for i, s in enumerate(samples)))

    def _score_group(
        self, name: str, function: RewardFunction, samples: list[RewardSample], timeout_s: float
    ) -> None:
        prompt_id = samples[0].prompt_id if samples else ""
        try:
            value = function.call(samples)
            if inspect.isawaitable(value):
                value = self._runner.run(_bounded(value, timeout_s))
            scores = _group_scores(value, len(samples))
        except TimeoutError as error:
            scores = [Score(error=_explain(name, prompt_id, error, timeout_s))] * len(samples)
        except Exception as error:
            scores = [Score(error=_explain(name, prompt_id, error))] * len(samples)
        for i, score in enumerate(scores):
            self._answer(i, score)

    def _answer(self, index: int, score: Score) -> None:
        if score.error:
            self._write({"index": index, "error": score.error})
        else:
            self._write({"index": index, "reward": score.reward, "parts": dict(score.parts)})

    def _read(self) -> dict[str, Any] | None:
        head = self._source.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            return None
        return json.loads(self._source.read(_LENGTH.unpack(head)[0]))

    def _write(self, message: dict[str, Any]) -> None:
        body = json.dumps(message).encode()
        self._sink.write(_LENGTH.pack(len(body)) + body)
        self._sink.flush()


async def _bounded(value: Any, timeout_s: float) -> Any:
    return await asyncio.wait_for(value, timeout_s)


def _group_scores(value: Any, wanted: int) -> list[Score]:
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
        raise BadReward(
            f"returned {type(value).__name__} for {wanted} samples; return a list of {wanted} numbers"
        )
    values = list(value)
    if len(values) != wanted:
        raise BadReward(f"returned {len(values)} rewards for {wanted} samples; return one a sample, in order")
    return [read_score(v) for v in values]


def _sample(fields: dict[str, Any]) -> RewardSample:
    for name in ("messages", "prompt_tokens", "response_tokens"):
        fields[name] = tuple(fields[name])
    return RewardSample(**fields)


def _explain(name: str, prompt_id: str, error: Exception, timeout_s: float | None = None) -> str:
    start = f"reward {name!r}, prompt {prompt_id!r}: "
    if timeout_s is not None:
        return f"{start}no answer within {timeout_s:g} s (rollout.reward_timeout_s)"
    if isinstance(error, BadReward):
        return start + str(error)
    return f"{start}raised {type(error).__name__}: {error}"


def _take_over_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keeps the pipes for the protocol; the reward gets an empty stdin, and stderr for a stdout."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return source, sink


def main(arguments: Sequence[str]) -> None:
    """Runs a worker; `arguments` are folders to import from, besides the current one."""
    die_with_parent(signal.SIGKILL)
    sys.path[:0] = ["", *arguments]
    source, sink = _take_over_pipes()
    with source, sink:
        Worker(source, sink).run()


if __name__ == "__main__":
    main(sys.argv[1:])
