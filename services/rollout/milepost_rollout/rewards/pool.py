"""A small pool of worker processes for rewards; see `worker.py` for what they are told and answer.

    score(job) --> idle worker --> answers, one sample at a time --> scores
                       |  silent for timeout_s, or dead
                       `-> SIGKILL; the sample at which it stood gets an error, the others another worker

A job belongs to one worker at a time, so `size` groups are scored at once and the rest wait in turn. Workers
start when first needed and are owned by the pool: `close()` kills them, and they die with this process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
from asyncio.streams import FlowControlMixin
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from milepost.errors import InvalidArgument
from milepost_rollout.rewards.contract import RewardSample, Score

_LENGTH = struct.Struct("<I")
_REAP_S = 5.0
_END_S = 5.0
"""How long a worker that closed its pipes may take to end, before it is killed and its exit code lost."""


class WorkerDied(Exception):
    """The worker's pipes closed in the middle of a job."""


class RewardWorker:
    """One process. Driven by one job at a time; after an error it must be killed.

    It is started by `subprocess`, which forks with vfork: uvloop's own subprocesses run the fork handlers of
    every library in the child of a process with threads, and gRPC's have been seen to hang there, and the
    loop with it.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, reward_path: Sequence[str]) -> RewardWorker:
        """Starts a process that imports from `reward_path` and the current folder.

        Called on the main thread, for the kernel ends the worker when the thread that started it ends.
        """
        process = subprocess.Popen(  # noqa: ASYNC220  # about a millisecond
            [sys.executable, "-m", "milepost_rollout.rewards.worker", *reward_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), process.stdout)
        transport, protocol = await loop.connect_write_pipe(FlowControlMixin, process.stdin)
        return cls(process, reader, asyncio.StreamWriter(transport, protocol, None, loop))

    @property
    def pid(self) -> int:
        """Its process id, which is that of its process group too."""
        return self._process.pid

    async def send(self, message: dict[str, Any]) -> None:
        """Writes one frame."""
        body = json.dumps(message).encode()
        try:
            self._writer.write(_LENGTH.pack(len(body)) + body)
            await self._writer.drain()
        except (ConnectionError, BrokenPipeError) as error:
            raise WorkerDied from error

    async def receive(self) -> dict[str, Any]:
        """Reads one frame."""
        try:
            head = await self._reader.readexactly(_LENGTH.size)
            return json.loads(await self._reader.readexactly(_LENGTH.unpack(head)[0]))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise WorkerDied from error

    async def kill(self, *, after_s: float = 0.0) -> str:
        """Kills it with all it started, unless it ends within `after_s`; returns in words how it ended."""
        try:
            await asyncio.to_thread(self._process.wait, after_s)
        except subprocess.TimeoutExpired:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        code = await asyncio.to_thread(self._process.wait, _REAP_S)
        self._writer.close()
        return f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"


@dataclass
class _Job:
    """The samples of a job that still need a score, by their position in the call."""

    name: str
    samples: Sequence[RewardSample]
    scores: dict[int, Score] = field(default_factory=dict[int, Score])
    in_order: bool = True
    """One sample after the other: the first one unanswered is where a silent worker stands."""

    def missing(self) -> list[int]:
        return [i for i in range(len(self.samples)) if i not in self.scores]

    def fail(self, positions: Sequence[int], what: str) -> None:
        for i in positions:
            prompt_id = self.samples[i].prompt_id
            self.scores[i] = Score(error=f"reward {self.name!r}, prompt {prompt_id!r}: {what}")


class WorkerPool:
    """Scores samples in worker processes.

    Args:
      size: processes, which is how many groups are scored at once.
      timeout_s: longest silence before a sample counts as hung.
      load_timeout_s: longest time for a worker to start and import a module.
      reward_path: folders to import from, besides the current one.
    """

    def __init__(
        self, *, size: int, timeout_s: float, load_timeout_s: float = 120.0, reward_path: Sequence[str] = ()
    ) -> None:
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._reward_path = tuple(reward_path)
        self._free = asyncio.Semaphore(size)
        self._idle: list[RewardWorker] = []
        self._all: set[RewardWorker] = set()

    async def check(self, name: str) -> None:
        """Loads a reward in a worker.

        Raises:
          InvalidArgument: it cannot be loaded; names module, function and remedy.
        """
        job = _Job(name, ())
        async with self._free:
            refused = await self._attempt(job, [])
        if refused:
            raise InvalidArgument(refused, reason="REWARD_NOT_LOADED")

    async def score(self, name: str, samples: Sequence[RewardSample]) -> list[Score]:
        """Scores the samples of one prompt, in order; never raises for what the reward does."""
        job = _Job(name, samples)
        async with self._free:
            while missing := job.missing():
                refused = await self._attempt(job, missing)
                if refused:
                    job.scores.update({i: Score(error=refused) for i in job.missing()})
        return [job.scores[i] for i in range(len(samples))]

    async def close(self) -> None:
        """Kills the workers."""
        workers = list(self._all)
        self._all.clear()
        self._idle.clear()
        await asyncio.gather(*(w.kill() for w in workers))

    async def _attempt(self, job: _Job, positions: list[int]) -> str:
        """Gives one worker the samples at `positions`; returns why the reward was refused, if it was."""
        worker = self._idle.pop() if self._idle else await self._start()
        loaded = False
        try:
            samples = [asdict(job.samples[i]) for i in positions]
            async with asyncio.timeout(self._load_timeout_s):
                await worker.send({"reward": job.name, "samples": samples, "timeout_s": self._timeout_s})
                reply = await worker.receive()
            if "refused" in reply:
                self._idle.append(worker)
                return reply["refused"]
            loaded, job.in_order = True, reply["in_order"]
            await self._collect(worker, job, positions)
            self._idle.append(worker)
        except (WorkerDied, TimeoutError) as error:
            how = await self._discard(worker, after_s=_END_S if isinstance(error, WorkerDied) else 0.0)
            if not loaded:
                return _not_loaded(job.name, error, how, self._load_timeout_s)
            self._blame(job, positions, error, how)
        except BaseException:
            await self._discard(worker)
            raise
        return ""

    async def _collect(self, worker: RewardWorker, job: _Job, positions: list[int]) -> None:
        # Async rewards mind the time-out themselves; this one is a little longer so that theirs speaks first.
        silence_s = 1.1 * self._timeout_s + 0.2
        while "done" not in (reply := await asyncio.wait_for(worker.receive(), silence_s)):
            error = reply.get("error", "")
            score = Score(error=error) if error else Score(reward=reply["reward"], parts=reply["parts"])
            job.scores[positions[reply["index"]]] = score

    def _blame(self, job: _Job, positions: list[int], error: Exception, how: str) -> None:
        missing = [i for i in positions if i not in job.scores]
        if isinstance(error, TimeoutError):
            what = f"no answer within {self._timeout_s:g} s (rollout.reward_timeout_s); its worker was killed"
        else:
            what = f"its worker {how}"
        job.fail(missing[:1] if job.in_order else missing, what)

    async def _start(self) -> RewardWorker:
        worker = await RewardWorker.start(self._reward_path)
        self._all.add(worker)
        return worker

    async def _discard(self, worker: RewardWorker, *, after_s: float = 0.0) -> str:
        self._all.discard(worker)
        return await worker.kill(after_s=after_s)


def _not_loaded(name: str, error: Exception, how: str, load_timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"reward {name!r}: not imported within {load_timeout_s:g} s; make its module import faster"
    return f"reward {name!r}: the worker {how} while importing it; import it by hand to see why"
