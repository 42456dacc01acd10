"""The ranks as a crew: rank 0 commands, every rank does the same thing at the same time.

    rank 0:  Crew.call(op) --broadcast--> all ranks: Rank.perform(op) --> rank 0 gets its own result

    rank 0's event loop       gRPC, decisions
    other ranks' event loop   follow() until "stop"
    each rank's event loop    fetching its own payloads; decoding and packing them on a thread beside
    each rank's torch thread  everything that is collective; one thread

Commands are the only way to the model, so collectives meet in one order on all ranks. A rank that fails ends
its process; the launcher then ends the others, and the run resumes from its checkpoint. While rank 0 has
nothing to say, `keep_alive` sends "idle", so that no rank waits for longer than a collective may take.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from milepost.types import GroupPayload
from milepost_trainer.learner import Learner
from milepost_trainer.payloads import read_payloads, to_train_group, write_transcripts
from milepost_trainer.plan import StepPlan
from milepost_trainer.prepare import PreparedStep
from milepost_trainer.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")
_LEAVE_AT_REST = ("idle", "fetch")
Fetch = Callable[[Sequence[str]], Awaitable[dict[str, bytes]]]


@dataclass(frozen=True)
class StepOrder:
    """What every rank needs to know to fetch and train a step.

    Attributes:
        plan: of the step.
        default_temperature: of the run.
        transcripts: folder for this step's transcripts; empty: none are written.
    """

    plan: StepPlan
    default_temperature: float = 1.0
    transcripts: str = ""


@dataclass(frozen=True)
class Ready:
    """A step that a rank has fetched and packed.

    Attributes:
        payloads: prompt_id -> what was fetched, where transcripts are wanted; else empty.
        prepared: the rank's share, packed.
        fetch_s: wall seconds that fetching took.
        pack_s: wall seconds that decoding and packing took.
    """

    payloads: Mapping[str, GroupPayload]
    prepared: PreparedStep
    fetch_s: float
    pack_s: float


@dataclass(frozen=True)
class StepStart:
    """A step that was begun.

    Attributes:
        refused: prompt_id -> why, on rank 0, of the groups that were left out; elsewhere empty.
        fetch_s: of this rank, see ``Ready``.
        pack_s: of this rank, see ``Ready``.
    """

    refused: Mapping[str, str]
    fetch_s: float = 0.0
    pack_s: float = 0.0


class Rank:
    """One rank's side of the commands.

    Args:
        world: who I am.
        learner: trains my share; called from my torch thread only.
        fetch: brings payloads by prompt id; runs on the event loop.
    """

    def __init__(self, world: World, learner: Learner, *, fetch: Fetch) -> None:
        self.world = world
        self.learner = learner
        self._fetch = fetch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch", initializer=world.take_device)
        self._orders: dict[int, StepOrder] = {}
        self._fetched: dict[int, asyncio.Task[Ready]] = {}

    async def follow(self) -> None:
        """Do what rank 0 says until it says stop."""
        while True:
            op, args = await self.on_thread(lambda: self.world.broadcast(None))
            if op == "stop":
                return
            await self.perform(op, args)

    async def perform(self, op: str, args: tuple[Any, ...]) -> Any:
        """Do one command; its result matters on rank 0 alone."""
        backend = self.learner.backend
        match op:
            case "idle":
                return None
            case "fetch":
                return self._start_fetch(*args)
            case "rest":
                return await self.on_thread(backend.rest)
            case "start_step":
                return await self._start_step(*args)
            case "start_update":
                return await self.on_thread(lambda: self.learner.start_update(*args))
            case "train_micro_batch":
                return await self.on_thread(lambda: self.learner.train_micro_batch(*args))
            case "finish_update":
                return await self.on_thread(self.learner.finish_update)
            case "gather_bucket":
                return await self.on_thread(lambda: backend.gather_bucket(*args))
            case "score":
                return await self.on_thread(lambda: self.learner.score(*args))
            case "whole_weights":
                return await self.on_thread(lambda: backend.whole_weights(*args))
            case "save":
                return await self.on_thread(lambda: backend.save(Path(*args)))
            case "load":
                return await self.on_thread(lambda: backend.load(Path(*args)))
            case "export":
                return await self.on_thread(lambda: backend.export_hf(Path(*args)))
            case _:
                raise AssertionError(f"unknown command {op!r}: ranks run different versions")

    async def on_thread(self, call: Callable[[], T]) -> T:
        """Run a call on the torch thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def close(self) -> None:
        """Give up what is being fetched and end the torch thread once it is idle."""
        for task in self._fetched.values():
            task.cancel()
        await asyncio.gather(*self._fetched.values(), return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ fetching

    def _start_fetch(self, order: StepOrder) -> None:
        """Begin to fetch a step's payloads, in place of what was fetched for it before."""
        step = order.plan.step
        earlier = self._fetched.pop(step, None)
        if earlier is not None:
            earlier.cancel()
        self._orders[step] = order
        self._fetched[step] = asyncio.create_task(self._make_ready(order), name=f"fetch step {step}")

    async def _make_ready(self, order: StepOrder) -> Ready:
        """Fetch and pack a step beside whatever the torch thread does."""
        prompt_ids = order.plan.prompt_ids_of(self.world.rank)
        begun = time.monotonic()
        raw = await self._fetch(prompt_ids) if prompt_ids else {}
        fetched = time.monotonic()
        payloads, prepared = await asyncio.to_thread(self._pack, order, raw)
        return Ready(payloads, prepared, fetch_s=fetched - begun, pack_s=time.monotonic() - fetched)

    def _pack(self, order: StepOrder, raw: dict[str, bytes]) -> tuple[dict[str, GroupPayload], PreparedStep]:
        self.world.take_device()  # pinned memory belongs to one
        payloads = read_payloads(raw)
        groups = {
            prompt_id: to_train_group(payload, default_temperature=order.default_temperature)
            for prompt_id, payload in payloads.items()
        }
        return payloads if order.transcripts else {}, self.learner.prepare(order.plan, groups)

    async def _start_step(self, step: int) -> StepStart:
        """Wait until the step is ready, and begin it."""
        order, task = self._orders.pop(step), self._fetched.pop(step)
        await asyncio.wait([task])
        failure = task.exception()
        if await self.on_thread(lambda: self.world.any_failed(failure is not None)):
            raise failure or RuntimeError(f"another rank could not fetch its groups of step {step}")
        return await self.on_thread(lambda: self._begin(order, task.result()))

    def _begin(self, order: StepOrder, ready: Ready) -> StepStart:
        refused = self.learner.begin_step(ready.prepared)
        if order.transcripts:
            suffix = f".rank_{self.world.rank}" if self.world.size > 1 else ""
            path = Path(order.transcripts) / f"step_{order.plan.step:08d}{suffix}.jsonl"
            write_transcripts(path, step=order.plan.step, payloads=ready.payloads.values())
        every = {prompt_id: why for part in self.world.gather(refused) for prompt_id, why in part.items()}
        return StepStart(every, fetch_s=ready.fetch_s, pack_s=ready.pack_s)


class Crew:
    """Rank 0's hand on all ranks."""

    def __init__(self, rank: Rank, *, idle_every_s: float = 20.0) -> None:
        self._rank = rank
        self._idle_every_s = idle_every_s
        self._lock = asyncio.Lock()
        self._spoke = asyncio.Event()
        self._running: set[asyncio.Task[Any]] = set()
        self._resting = False

    async def call(self, op: str, *args: Any) -> Any:
        """Have every rank do one command; returns rank 0's result.

        A command that was begun is carried out on every rank even if the caller is cancelled meanwhile: half
        a collective would hang the crew.
        """
        task = asyncio.create_task(self._command(op, args), name=f"command {op}")
        self._running.add(task)
        task.add_done_callback(self._settle)
        return await asyncio.shield(task)

    async def rest(self) -> None:
        """Have every rank give back the memory that it can spare, unless nothing was asked of it since."""
        if not self._resting:
            await self.call("rest")

    def _settle(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # the caller has it, or is gone

    async def _command(self, op: str, args: tuple[Any, ...]) -> Any:
        async with self._lock:
            self._spoke.set()
            if op not in _LEAVE_AT_REST:
                self._resting = op == "rest"
            if self._rank.world.size > 1:
                await self._rank.on_thread(lambda: self._rank.world.broadcast((op, args)))
            return None if op == "stop" else await self._rank.perform(op, args)

    async def keep_alive(self) -> None:
        """Speak at least every `idle_every_s`, for as long as there are other ranks."""
        while self._rank.world.size > 1:
            self._spoke.clear()
            try:
                async with asyncio.timeout(self._idle_every_s):
                    await self._spoke.wait()
            except TimeoutError:
                await self.call("idle")
