"""Rewards as a user might write them, good and bad; imported by workers, not a test module."""

from __future__ import annotations

import asyncio
import atexit
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

calls = 0


def length(sample: Any) -> float:
    print("a reward may print")
    return len(sample.response)


def everything(sample: Any) -> dict[str, float]:
    return {
        "reward": float(sample.metadata["level"]),
        "tokens": len(sample.response_tokens),
        "prompt_tokens": len(sample.prompt_tokens),
        "turns": len(sample.messages),
        "truncated": float(sample.outcome == "truncated"),
    }


async def slow_but_fine(sample: Any) -> float:
    await asyncio.sleep(0.01)
    return sample.index


def ranked(samples: list[Any]) -> list[float]:
    return [len(samples) - s.index for s in samples]


async def ranked_async(samples: list[Any]) -> list[float]:
    await asyncio.sleep(0)
    return [1.0] * len(samples)


class Judge:
    async def __call__(self, sample: Any) -> float:
        return 0.25


judge = Judge()


def decorated(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def inner(sample: Any) -> Any:
        return f(sample)

    return inner


@decorated
async def hidden_async(sample: Any) -> float:
    return 0.75


def raises_at_1(sample: Any) -> float:
    if sample.index == 1:
        raise ValueError("cannot read the answer")
    return 1.0


def hangs_at_1(sample: Any) -> float:
    while sample.index == 1:
        time.sleep(0.01)
    return 1.0


async def sleeps_at_1(sample: Any) -> float:
    if sample.index == 1:
        await asyncio.Event().wait()
    return 1.0


async def blocks_the_loop(sample: Any) -> float:
    while True:
        time.sleep(0.01)  # noqa: ASYNC251  # the point of it


def group_hangs(samples: list[Any]) -> list[float]:
    while True:
        time.sleep(0.01)


def kills_itself_at_1(sample: Any) -> float:
    if sample.index == 1:
        os.kill(os.getpid(), 9)
    return 1.0


def exits_at_1(sample: Any) -> float:
    if sample.index == 1:
        sys.exit(3)
    return 1.0


def exits_slowly_at_1(sample: Any) -> float:
    if sample.index == 1:
        atexit.register(time.sleep, 1.0)
        sys.exit(3)
    return 1.0


def not_a_number(sample: Any) -> Any:
    return [float("nan"), float("inf"), "1.0", None][sample.index]


def too_few(samples: list[Any]) -> list[float]:
    return [1.0]


def no_list(samples: list[Any]) -> Any:
    return 1.0


def two_arguments(prompt: Any, response: Any) -> float:
    return 0.0


def writes_pid_and_hangs(sample: Any) -> float:
    Path(sample.metadata["path"]).write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


NUMBER = 3


def everything_is_one(sample: Any) -> float:
    return 1.0
