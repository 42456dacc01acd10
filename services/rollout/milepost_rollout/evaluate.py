"""Evaluation: held-out prompts at one weight version, scored, beside the running rollout.

    WatchVersions --> newest version --(every n steps)--> evaluate --> counters, eval.jsonl
    Evaluate rpc  ------------------------------------------^

Its samples go before those of training (`capacity.py`). A sample whose version went away before it was done
counts as aborted: the mean is over what was scored, and says of how many; over nothing it is NaN.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from milepost import jsonl
from milepost.errors import InvalidArgument, MilepostError
from milepost.types import Evaluation, Prompt, RunConfig, Sample, SamplingParams, WeightVersion
from milepost_rollout.backoff import Backoff, BackoffPolicy
from milepost_rollout.capacity import Priority
from milepost_rollout.roller import GroupRoller, RollRequest
from milepost_rollout.sampler import EnginesUnavailable
from milepost_rollout.sampling import resolve
from milepost_rollout.status import Counters

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 300.0
ATTEMPTS = 3
GREEDY = SamplingParams(temperature=0.0)


class Versions(Protocol):
    """What is asked of the ledger; `milepost.client.WeightClient` is one."""

    async def get_version(self, run_id: str, *, version: int = 0) -> WeightVersion:
        """A version, or the newest published one."""
        ...

    def watch_versions(
        self, run_id: str, *, after_version: int = 0, max_wait_s: float = 60.0
    ) -> AsyncIterator[WeightVersion]:
        """Publications."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EvaluationRequest:
    """What to evaluate; what is unset is the gateway's and the run's."""

    prompts: Sequence[Prompt] = ()
    run_id: str = ""
    weight_version: int = 0
    samples_per_prompt: int = 0
    sampling: SamplingParams | None = None
    reward: str = ""
    timeout_s: float = 0.0


class Evaluator:
    """Evaluates on request.

    Args:
      roller: rolls prompts out.
      config: waits for the run to exist and returns its configuration as it is then.
      counters: keeps the newest evaluation.
      versions: the ledger's versions; None when the gateway runs standalone.
      run_id: the gateway's run.
      prompts: held-out prompts for requests that bring none.
    """

    def __init__(
        self,
        *,
        roller: GroupRoller,
        config: Callable[[], Awaitable[RunConfig]],
        counters: Counters,
        versions: Versions | None = None,
        run_id: str = "",
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self._roller = roller
        self._config = config
        self._counters = counters
        self._versions = versions
        self._run_id = run_id
        self._prompts = prompts

    async def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Rolls the prompts out and scores them.

        Raises:
          InvalidArgument: there are no prompts, or no reward.
          NotFound: no such version, or none published yet.
        """
        started = time.monotonic()
        prompts = list(request.prompts or self._prompts)
        run_id = request.run_id or self._run_id
        version = await self._version(run_id, request.weight_version)
        roll = _roll_request(request, prompts, run_id, version.version, await self._config())
        timeout_s = request.timeout_s or DEFAULT_TIMEOUT_S
        outcomes = await self._roll_all(roll, prompts, timeout_s)
        evaluation = summarise(outcomes, num_requested=roll.num_samples * len(prompts))
        evaluation = replace(
            evaluation,
            weight_version=version.version or evaluation.weight_version,
            weight_label=version.label,
            duration_s=time.monotonic() - started,
        )
        self.keep(evaluation)
        return evaluation

    def keep(self, evaluation: Evaluation) -> None:
        """Makes it the evaluation that GetStatus shows."""
        self._counters.last_evaluation = evaluation

    async def _version(self, run_id: str, version: int) -> WeightVersion:
        if self._versions is None or not run_id:
            return WeightVersion(version=version)
        return await self._versions.get_version(run_id, version=version)

    async def _roll_all(
        self, roll: RollRequest, prompts: Sequence[Prompt], timeout_s: float
    ) -> list[Sample | str]:
        """Samples, or in place of one the name of a failure."""
        tasks = [asyncio.create_task(self._roll_one(replace(roll, prompt=p))) for p in prompts]
        try:
            done, _ = await asyncio.wait(tasks, timeout=timeout_s)
            finished = [outcome for task in tasks if task in done for outcome in task.result()]
            missing = roll.num_samples * sum(task not in done for task in tasks)
            return finished + ["aborted"] * missing
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _roll_one(self, roll: RollRequest) -> list[Sample | str]:
        session = f"evaluation/{roll.version}/{roll.prompt.prompt_id}"
        try:
            return list(await self._roller.roll(replace(roll, session=session)))
        except InvalidArgument as error:
            log.warning("evaluation, prompt %r: %s", roll.prompt.prompt_id, error)
            return ["invalid"] * roll.num_samples
        except EnginesUnavailable as error:
            log.warning("evaluation, prompt %r: %s", roll.prompt.prompt_id, error)
            return ["engine_error"] * roll.num_samples


def _roll_request(
    request: EvaluationRequest, prompts: Sequence[Prompt], run_id: str, version: int, config: RunConfig
) -> RollRequest:
    if not prompts:
        raise InvalidArgument(
            "prompts: there are none; send some, or set rollout.evaluate.prompts to a JSONL file",
            reason="NO_PROMPTS",
        )
    reward = request.reward or config.reward
    if not reward and not all(p.reward for p in prompts):
        raise InvalidArgument("reward: neither request nor run names one; set it", reason="NO_REWARD")
    return RollRequest(
        prompt=prompts[0],
        num_samples=request.samples_per_prompt or 1,
        sampling=resolve(request.sampling or GREEDY, config.sampling),
        reward=reward,
        run_id=run_id,
        version=version,
        priority=Priority.EVALUATION,
    )


def summarise(outcomes: Sequence[Sample | str], *, num_requested: int) -> Evaluation:
    """Adds samples up; a string in place of a sample is a failure's name."""
    samples = [s for s in outcomes if isinstance(s, Sample)]
    scored = [s for s in samples if not s.outcome.is_error and s.reward == s.reward]
    failures: Counter[str] = Counter(s for s in outcomes if isinstance(s, str))
    failures.update(s.outcome.name.lower() for s in samples if s.outcome.is_error)
    versions = {span.weight_version for s in scored for span in s.version_spans}
    count = len(scored) or 1
    return Evaluation(
        weight_version=min(versions, default=0),
        reward_mean=sum(s.reward for s in scored) / count if scored else math.nan,
        num_scored=len(scored),
        num_requested=num_requested,
        failures=dict(failures),
        response_tokens_mean=sum(len(s.tokens) - s.prompt_length for s in scored) / count,
    )


class PeriodicEvaluation:
    """Evaluates the newest version whenever its label has passed another multiple of `every_steps`.

    Args:
      evaluator: does it.
      versions: the ledger's versions.
      run_id: the run.
      every_steps: steps between evaluations; the first published version is evaluated too.
      request: how.
      results: JSONL file that each evaluation is appended to.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        *,
        versions: Versions,
        run_id: str,
        every_steps: int,
        request: EvaluationRequest,
        results: Path,
    ) -> None:
        self._evaluator = evaluator
        self._versions = versions
        self._run_id = run_id
        self._every_steps = every_steps
        self._request = request
        self._results = results
        self._newest: WeightVersion | None = None
        self._published = asyncio.Event()

    async def run(self) -> None:
        """Watches and evaluates until it is cancelled."""
        watching = asyncio.create_task(self._watch())
        try:
            due = 0
            while True:
                await self._published.wait()
                self._published.clear()
                version = self._newest
                if version is not None and version.label >= due:
                    due = (version.label // self._every_steps + 1) * self._every_steps
                    await self._evaluate(version)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self) -> None:
        backoff = Backoff(BackoffPolicy(first_s=0.2, most_s=5.0))
        while True:
            after = self._newest.version if self._newest else 0
            try:
                async for version in self._versions.watch_versions(self._run_id, after_version=after):
                    backoff.reset()
                    self._newest = version
                    self._published.set()
            except MilepostError as error:
                log.debug("cannot watch versions: %s", error)
            await asyncio.sleep(backoff.next_s())

    async def _evaluate(self, version: WeightVersion) -> None:
        try:
            evaluation = await self._best_of_newest(version)
            self._evaluator.keep(evaluation)
            await asyncio.to_thread(append_result, self._results, self._run_id, evaluation)
        except (MilepostError, OSError) as error:
            log.error("the evaluation of version %d failed: %s", version.version, error)
            return
        log.info(
            "evaluation of step %d (version %d): reward %.4f over %d of %d samples",
            evaluation.weight_label,
            evaluation.weight_version,
            evaluation.reward_mean,
            evaluation.num_scored,
            evaluation.num_requested,
        )

    async def _best_of_newest(self, version: WeightVersion) -> Evaluation:
        """Evaluates `version`; where it went away meanwhile, the newest one, and keeps the fullest result."""
        best: Evaluation | None = None
        for _ in range(ATTEMPTS):
            request = replace(self._request, weight_version=version.version)
            evaluation = await self._evaluator.evaluate(request)
            if best is None or evaluation.num_scored > best.num_scored:
                best = evaluation
            newest = self._newest or version
            if not evaluation.failures.get("aborted") or newest.version == version.version:
                break
            version = newest
        assert best is not None
        return best


def append_result(path: Path, run_id: str, evaluation: Evaluation) -> None:
    """Appends one line to the results; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"time": time.time(), "run_id": run_id, **asdict(evaluation)}
    line = json.dumps(row | {"reward_mean": evaluation.reward_mean if evaluation.num_scored else None})
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def load_prompts(path: str | Path) -> list[Prompt]:
    """Reads held-out prompts.

    Raises:
      InvalidArgument: the file cannot be read, or has a malformed line: held-out sets do not shrink in
      silence.
    """
    try:
        lines = list(jsonl.read_file(path))
    except OSError as error:
        raise InvalidArgument(
            f"rollout.evaluate.prompts {str(path)!r}: {error.strerror}; name a JSONL file",
            reason="BAD_SETTING",
        ) from error
    wrong = [line.error for line in lines if line.error is not None]
    if wrong:
        raise InvalidArgument(f"rollout.evaluate.prompts {str(path)!r}: {wrong[0]}", reason="BAD_SETTING")
    return [line.prompt for line in lines if line.prompt is not None]
