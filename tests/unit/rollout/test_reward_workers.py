"""Rewards in real worker processes: right answers, and every way in which a reward can go wrong."""

# ruff: noqa: ASYNC110  # polled with a deadline: what is waited for has no event of its own

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from milepost.errors import InvalidArgument
from milepost_rollout.rewards import RewardSample
from milepost_rollout.rewards.pool import WorkerPool

HERE = str(Path(__file__).parent)
PATIENT_S, IMPATIENT_S = 60.0, 4.0


@pytest.fixture
async def pool() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(size=1, timeout_s=PATIENT_S, reward_path=[HERE])
    yield pool
    await pool.close()


@pytest.fixture
async def impatient() -> AsyncIterator[WorkerPool]:
    """For rewards that hang; a good one must answer in time even where the machine stands still for 3 s."""
    pool = WorkerPool(size=1, timeout_s=IMPATIENT_S, reward_path=[HERE])
    yield pool
    await pool.close()


def samples(*responses: str, label: str = "2", **more: object) -> list[RewardSample]:
    return [
        RewardSample(
            prompt_id="p7",
            index=i,
            prompt="1+1=",
            response=r,
            label=label,
            response_tokens=(5,) * len(r),
            **more,
        )
        for i, r in enumerate(responses)
    ]


async def rewards(pool: WorkerPool, name: str, given: list[RewardSample]) -> list[float]:
    scores = await pool.score(name, given)
    assert [s.error for s in scores] == [""] * len(given)
    return [s.reward for s in scores]


@pytest.mark.parametrize(
    "name, label, responses, wanted",
    [
        (
            "math",
            "1/2",
            [r"\boxed{\frac{1}{2}}", "0.5", "so it is $\\frac{2}{4}$", "0.25", "no idea"],
            [1, 1, 1, 0, 0],
        ),
        ("math", r"\frac{3}{4}", ["3/4", "4/3"], [1, 0]),
        ("math", r"3\sqrt{2}", [r"3\sqrt{2}", r"$\sqrt{18}$", "3"], [1, 1, 0]),
        ("regex:answer: (\\d+)", "2", ["the answer: 2.", "answer: 3", "2"], [1, 0, 0]),
        ("regex:^yes", "", ["yes", "oh yes"], [1, 0]),
        ("regex:x(y)?", "", ["x"], [1]),
    ],
)
async def test_built_in(pool: WorkerPool, name: str, label: str, responses: list[str], wanted: list[float]):
    assert await rewards(pool, name, samples(*responses, label=label)) == wanted


async def test_math_does_not_blame_the_model_for_a_label_it_cannot_read(pool: WorkerPool):
    (score,) = await pool.score("math", samples("2", label="\\frac{"))
    assert r"label '\\frac{'" in score.error


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("user_rewards:length", [1, 2, 3]),
        ("user_rewards:slow_but_fine", [0, 1, 2]),
        ("user_rewards:ranked", [3, 2, 1]),
        ("user_rewards:ranked_async", [1, 1, 1]),
        ("user_rewards:judge", [0.25, 0.25, 0.25]),
        ("user_rewards:hidden_async", [0.75, 0.75, 0.75]),
    ],
)
async def test_users_functions(pool: WorkerPool, name: str, wanted: list[float]):
    assert await rewards(pool, name, samples("a", "bb", "ccc")) == wanted


async def test_parts_and_everything_a_function_sees(pool: WorkerPool):
    given = samples(
        "ab", metadata={"level": 3}, messages=({"role": "user", "content": "x"},), prompt_tokens=(1, 2, 3)
    )
    (score,) = await pool.score("user_rewards:everything", given)
    assert score.reward == 3
    assert dict(score.parts) == {"tokens": 2, "prompt_tokens": 3, "turns": 1, "truncated": 0}


@pytest.mark.parametrize(
    "name, said",
    [
        ("user_rewards:raises_at_1", "raised ValueError: cannot read the answer"),
        ("user_rewards:hangs_at_1", "no answer within 4 s (rollout.reward_timeout_s)"),
        ("user_rewards:sleeps_at_1", "no answer within 4 s (rollout.reward_timeout_s)"),
        ("user_rewards:kills_itself_at_1", "its worker was killed by signal 9"),
        ("user_rewards:exits_at_1", "its worker ended with exit code 3"),
        ("user_rewards:exits_slowly_at_1", "its worker ended with exit code 3"),
    ],
)
async def test_one_bad_sample_does_not_cost_the_others(impatient: WorkerPool, name: str, said: str):
    first, bad, last = await impatient.score(name, samples("a", "b", "c"))
    assert (first.reward, last.reward) == (1, 1)
    assert bad.error.startswith(f"reward '{name}', prompt 'p7': ")
    assert said in bad.error
    assert bad.reward != bad.reward
    assert await rewards(impatient, "user_rewards:length", samples("a")) == [1]


@pytest.mark.parametrize("name", ["user_rewards:group_hangs", "user_rewards:blocks_the_loop"])
async def test_a_group_that_hangs_is_an_error_of_all(impatient: WorkerPool, name: str):
    scores = await impatient.score(name, samples("a", "b"))
    assert all("no answer within 4 s" in s.error for s in scores)
    assert await rewards(impatient, "user_rewards:length", samples("a")) == [1]


async def test_catastrophic_backtracking_is_killed(impatient: WorkerPool):
    bad, good = await impatient.score("regex:^(a+)+$", samples("a" * 40 + "b", "aaa", label="aaa"))
    assert "no answer within" in bad.error
    assert good.reward == 1


async def test_what_is_not_a_finite_number_is_an_error(pool: WorkerPool):
    scores = await pool.score("user_rewards:not_a_number", samples("a", "b", "c", "d"))
    for score, said in zip(
        scores, ["is nan", "is inf", "'1.0', not a number", "None, not a number"], strict=True
    ):
        assert said in score.error
        assert "return a finite float" in score.error


@pytest.mark.parametrize(
    "name, said",
    [
        ("user_rewards:too_few", "returned 1 rewards for 2 samples"),
        ("user_rewards:no_list", "returned float"),
    ],
)
async def test_a_group_function_must_answer_for_each(pool: WorkerPool, name: str, said: str):
    scores = await pool.score(name, samples("a", "b"))
    assert all(said in s.error for s in scores)


@pytest.mark.parametrize(
    "name, said",
    [
        ("no_such_module:f", ["'no_such_module'", "rollout.reward_path"]),
        ("user_rewards:lenght", ["no function 'lenght'", "did you mean 'length'?"]),
        ("user_rewards:NUMBER", ["'NUMBER' is int, not a function"]),
        ("user_rewards:two_arguments", ["(prompt, response)", "`samples`"]),
        ("broken_reward:f", ["raised NameError", "broken_reward.py:1", "mend"]),
        ("needs_more:f", ["needs 'no_such_library'", "install"]),
        ("suicidal:f", ["ended with exit code 5", "while importing"]),
    ],
)
async def test_what_cannot_be_loaded_says_why(tmp_path: Path, name: str, said: list[str]):
    (tmp_path / "broken_reward.py").write_text("oops")
    (tmp_path / "needs_more.py").write_text("import no_such_library")
    (tmp_path / "suicidal.py").write_text("import os; os._exit(5)")
    pool = WorkerPool(size=1, timeout_s=PATIENT_S, reward_path=[HERE, str(tmp_path)])
    try:
        with pytest.raises(InvalidArgument) as caught:
            await pool.check(name)
        for part in (f"reward {name!r}", *said):
            assert part in str(caught.value)
        (score,) = await pool.score(name, samples("a"))
        assert score.error == str(caught.value)
        await pool.check("user_rewards:length")
    finally:
        await pool.close()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


async def until(condition, what: str) -> None:
    try:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


async def test_a_hung_worker_is_really_gone_and_close_leaves_none(impatient: WorkerPool, tmp_path: Path):
    path = tmp_path / "pid"
    await impatient.score("user_rewards:writes_pid_and_hangs", samples("a", metadata={"path": str(path)}))
    assert not alive(int(path.read_text()))
    task = asyncio.create_task(
        impatient.score("user_rewards:writes_pid_and_hangs", samples("a", metadata={"path": str(path)}))
    )
    path.unlink()
    await until(lambda: path.exists() and path.read_text(), "the worker starts")
    pid = int(path.read_text())
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not alive(pid)


async def test_workers_die_with_a_gateway_that_is_killed(tmp_path: Path):
    path = tmp_path / "pid"
    script = (
        "import asyncio, sys\n"
        "from milepost_rollout.rewards import RewardSample\n"
        "from milepost_rollout.rewards.pool import WorkerPool\n"
        f"pool = WorkerPool(size=1, timeout_s=60, reward_path=[{HERE!r}])\n"
        f"seen = {{'path': {str(path)!r}}}\n"
        "s = RewardSample(prompt_id='p', index=0, prompt='', response='', metadata=seen)\n"
        "asyncio.run(pool.score('user_rewards:writes_pid_and_hangs', [s]))\n"
    )
    gateway = subprocess.Popen([sys.executable, "-c", script])  # noqa: ASYNC220
    try:
        await until(lambda: path.exists() and path.read_text(), "the worker starts")
        pid = int(path.read_text())
        gateway.kill()
        await until(lambda: not alive(pid), "the worker dies with its parent")
    finally:
        gateway.kill()
        gateway.wait(10)


async def test_several_groups_share_few_workers():
    pool = WorkerPool(size=2, timeout_s=PATIENT_S, reward_path=[HERE])
    try:
        many = await asyncio.gather(
            *(pool.score("user_rewards:length", samples("a" * (i + 1))) for i in range(20))
        )
        assert [s[0].reward for s in many] == list(range(1, 21))
        assert len(pool._all) == 2
    finally:
        await pool.close()
