"""Prompts in, scored trajectories out, with no trainer, no ledger and no state: the core of the `Rollout`
rpc.

    prompts --(room for a group)--> group tasks --> finished --> caller

| who        | consumes | produces     | waits for                  | who unblocks it           |
|------------|----------|--------------|----------------------------|---------------------------|
| feeder     | prompts  | group tasks  | room: `limit` groups       | the caller, by taking one |
| group task | a prompt | trajectories | slots, engines, the reward | other samples, the router |

A group keeps its room until the caller takes what it became, so a slow caller slows the source and not the
memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from milepost.errors import InvalidArgument
from milepost.types import Prompt, RolloutOptions, Trajectories
from milepost_common.telemetry import logs, tracing
from milepost_rollout.roller import GroupRoller, RollRequest
from milepost_rollout.sampler import EnginesUnavailable

MAX_ID_BYTES = 512


class RolloutStream:
    """One caller's stream.

    Args:
      roller: rolls prompts out.
      options: how; unset fields have their documented defaults.
      limit: groups in flight at once.
      name: tells streams apart in sessions.
    """

    def __init__(self, roller: GroupRoller, *, options: RolloutOptions, limit: int, name: str) -> None:
        self._roller = roller
        self._options = options
        self._name = name
        self._room = asyncio.Semaphore(limit)
        self._finished: asyncio.Queue[Trajectories | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, prompts: AsyncIterator[Prompt]) -> AsyncIterator[Trajectories]:
        """Yields what became of each prompt, in the order they finish.

        Raises:
          Whatever `prompts` raises, once; groups in flight are cancelled then.
        """
        feeder = asyncio.create_task(self._feed(prompts))
        try:
            while (trajectories := await self._finished.get()) is not None:
                self._room.release()
                yield trajectories
            await feeder
        finally:
            for task in (feeder, *self._tasks):
                task.cancel()
            await asyncio.gather(feeder, *self._tasks, return_exceptions=True)

    async def _feed(self, prompts: AsyncIterator[Prompt]) -> None:
        try:
            async for prompt in prompts:
                await self._room.acquire()
                task = asyncio.create_task(self._roll(prompt))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            while self._tasks:
                await asyncio.wait(tuple(self._tasks))
        finally:
            self._finished.put_nowait(None)

    async def _roll(self, prompt: Prompt) -> None:
        options = self._options
        request = RollRequest(
            prompt=prompt,
            num_samples=options.samples_per_prompt or 1,
            sampling=options.sampling,
            reward=options.reward,
            run_id=options.run_id,
            version=options.weight_version,
            session=f"{self._name}/{prompt.prompt_id}",
        )
        with (
            logs.about(run=options.run_id, prompt=prompt.prompt_id),
            tracing.span(
                "gateway.rollout",
                parent=prompt.traceparent,
                begins=True,
                run_id=options.run_id,
                prompt_id=prompt.prompt_id,
                version=options.weight_version or None,
            ),
        ):
            self._finished.put_nowait(await self._trajectories(request))

    async def _trajectories(self, request: RollRequest) -> Trajectories:
        prompt = request.prompt
        try:
            _check_id(prompt.prompt_id)
            samples = await self._roller.roll(request)
        except InvalidArgument as error:
            return Trajectories(prompt_id=prompt.prompt_id, error=str(error))
        except EnginesUnavailable as error:
            return Trajectories(prompt_id=prompt.prompt_id, error=f"engines: {error}; start an engine")
        return Trajectories(prompt_id=prompt.prompt_id, samples=samples)


def _check_id(prompt_id: str) -> None:
    if not 1 <= len(prompt_id.encode()) <= MAX_ID_BYTES:
        raise InvalidArgument(
            f"prompt_id is {prompt_id[:60]!r}, wanted 1 to {MAX_ID_BYTES} bytes; choose another name",
            reason="BAD_PROMPT_ID",
        )
