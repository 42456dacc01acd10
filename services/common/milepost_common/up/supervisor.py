"""Keeps the children of one run alive, and stops them all in order.

    specs --keeper task a child--> spawn, readiness, exit, back-off, spawn ...   (rules: policy.py)
                |                              |                                          |
                v                              v                                          v
        up.json, one line a change      silent for long: killed       verdict: finished | failed | interrupted

One keeper task owns each child and its `Life`. The supervisor owns the verdict: the first of a child that
ends the run, a child that is given up, and `interrupt`. Then keepers start nothing any more, and the children
are stopped rank by rank, those of one rank together, each with its deadline and then SIGKILL for its whole
group.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from milepost_common.liveness import until_silent
from milepost_common.up.child import Child, tail
from milepost_common.up.health import ask_health
from milepost_common.up.policy import Life, Phase, RestartPolicy
from milepost_common.up.readiness import parse_readiness
from milepost_common.up.spec import ChildSpec

Report = Callable[[str], None]

OK, FAILED, INTERRUPTED = 0, 1, 130
_KILL_DEADLINE_S = 10.0


@dataclass(kw_only=True)
class _Kept:
    """A child as its keeper knows it."""

    spec: ChildSpec
    log: Path
    life: Life = field(default_factory=Life)
    child: Child | None = None
    addresses: Mapping[str, str] = field(default_factory=dict[str, str])
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    was_ready: asyncio.Event = field(default_factory=asyncio.Event)
    started_at_s: float = 0.0


class Supervisor:
    """Runs children until the run is over.

    Args:
      specs: the children.
      run_dir: gets `logs/<name>.log` and `up.json`.
      policy: how patient it is with children that die.
      report: told of each change, in one line.
      about: further entries of `up.json`.
      stay: go on when a child that ends the run is done.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        run_dir: Path,
        policy: RestartPolicy,
        report: Report,
        about: Mapping[str, Any] | None = None,
        stay: bool = False,
    ) -> None:
        logs = run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._kept = {s.name: _Kept(spec=s, log=logs / f"{s.name}.log") for s in specs}
        self._run_dir, self._policy, self._report, self._stay = run_dir, policy, report, stay
        self._about = dict(about or {})
        self._stopping = asyncio.Event()
        self._verdict: asyncio.Future[int] | None = None
        self._keepers: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> int:
        """Runs until the verdict, stops everything, and returns the exit status."""
        self._verdict = asyncio.get_running_loop().create_future()
        self._keepers = {
            n: asyncio.create_task(self._keep(k), name=f"keep {n}") for n, k in self._kept.items()
        }
        try:
            return await self._verdict
        finally:
            await self._stop_all()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)
            self._write_state()

    async def ready(self, name: str) -> Mapping[str, str]:
        """Waits until a child was ready once; returns its addresses."""
        await self._kept[name].was_ready.wait()
        return self._kept[name].addresses

    def interrupt(self, code: int = INTERRUPTED) -> None:
        """Asks for the end; asked again, ends every child at once."""
        if self._stopping.is_set():
            for kept in self._kept.values():
                if kept.child:
                    kept.child.kill()
        self._decide(code)

    # ------------------------------------------------------------------ one child

    async def _keep(self, kept: _Kept) -> None:
        """Starts a child again and again until its life is over."""
        try:
            for name in kept.spec.needs:
                await self._kept[name].was_ready.wait()
            while not self._stopping.is_set() and not kept.life.phase.is_over:
                code = await self._live_once(kept)
                await self._after(kept, code)
        except Exception as error:  # a defect here must not leave children behind
            self._tell(kept, f"supervisor failed: {type(error).__name__}: {error}")
            self._decide(FAILED)
            raise

    async def _live_once(self, kept: _Kept) -> int:
        """From spawn to exit of one process."""
        kept.ready.clear()
        addresses = {n: k.addresses for n, k in self._kept.items()}
        kept.started_at_s = time.monotonic()
        self._move(kept, kept.life.spawned())
        command = kept.spec.command(addresses)
        try:
            kept.child = await Child.spawn(
                command, log=kept.log, on_line=lambda line: self._heard(kept, line), environ=kept.spec.environ
            )
        except OSError as error:
            self._tell(kept, f"cannot start {command[0]}: {error.strerror}")
            return 127
        if self._stopping.is_set():
            kept.child.terminate()
        if not kept.spec.announces:
            self._mark_ready(kept, {})
        self._write_state()
        await self._until_ready_or_dead(kept, kept.child)
        watching = asyncio.create_task(self._watch(kept, kept.child), name=f"watch {kept.spec.name}")
        try:
            return await kept.child.wait()
        finally:
            watching.cancel()
            (defect,) = await asyncio.gather(watching, return_exceptions=True)
            if isinstance(defect, Exception):
                self._tell(kept, f"its health was not looked at: {type(defect).__name__}: {defect}")

    async def _watch(self, kept: _Kept, child: Child) -> None:
        """Kills a child that was ready and answers no more: stopped, swapped out or stuck."""
        timeout_s = kept.spec.liveness_timeout_s
        if not timeout_s or not kept.addresses:
            return
        await kept.ready.wait()
        addresses = kept.addresses

        async def look(within_s: float) -> None:
            await ask_health(addresses, timeout_s=within_s)

        why = await until_silent(look, timeout_s=timeout_s)
        if not self._stopping.is_set():
            self._tell(kept, f"no answer to its health check for {timeout_s:g} s: killed ({why})")
            child.kill()

    async def _until_ready_or_dead(self, kept: _Kept, child: Child) -> None:
        ready = asyncio.create_task(kept.ready.wait())
        ended = asyncio.create_task(child.wait())
        try:
            done, _ = await asyncio.wait(
                (ready, ended), timeout=kept.spec.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                self._tell(kept, f"not ready after {kept.spec.ready_timeout_s:.0f} s: ended")
                child.kill()
        finally:
            ready.cancel()
            ended.cancel()

    def _heard(self, kept: _Kept, line: str) -> None:
        addresses = parse_readiness(line)
        if addresses is not None and not kept.ready.is_set():
            self._mark_ready(kept, addresses)

    def _mark_ready(self, kept: _Kept, addresses: Mapping[str, str]) -> None:
        kept.addresses = addresses or kept.addresses
        self._move(kept, kept.life.ready(time.monotonic()))
        kept.ready.set()
        kept.was_ready.set()
        where = " ".join(f"{k}={v}" for k, v in addresses.items())
        self._tell(kept, f"{where}  after {time.monotonic() - kept.started_at_s:.1f} s".strip())

    async def _after(self, kept: _Kept, code: int) -> None:
        """What follows an exit: nothing, the end of the run, or another start after a while."""
        pid = kept.child.pid if kept.child else 0
        life, delay_s = kept.life.exited(
            code, now_s=time.monotonic(), final_codes=kept.spec.final_codes, policy=self._policy
        )
        self._move(kept, life)
        kept.child = None
        how = f"pid {pid} {_how_it_ended(code)}"
        if life.phase is Phase.BACKOFF:
            self._tell(kept, f"{how}; again in {delay_s:.1f} s; log: {kept.log}")
            if code > 0:
                self._show_log(kept, num_lines=1)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            return
        self._tell(kept, how)
        if life.phase is Phase.FAILED:
            self._show_log(kept)
            self._decide(FAILED)
        elif life.phase is Phase.DONE and code in kept.spec.ends_run and not self._stay:
            verdict = kept.spec.ends_run[code]
            if verdict != OK:
                self._show_log(kept)
            self._decide(verdict)
        elif life.phase is Phase.DONE and code != OK:
            self._show_log(kept)

    # ------------------------------------------------------------------ the end

    def _decide(self, code: int) -> None:
        self._stopping.set()
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(code)

    async def _stop_all(self) -> None:
        self._stopping.set()
        for kept in self._kept.values():
            self._move(kept, kept.life.stopping(), write=False)
        self._write_state()
        for rank in sorted({k.spec.stop_rank for k in self._kept.values()}):
            await asyncio.gather(*(self._stop(k) for k in self._kept.values() if k.spec.stop_rank == rank))

    async def _stop(self, kept: _Kept) -> None:
        """Lets the keeper see its child's end, however that has to be brought about."""
        keeper = self._keepers[kept.spec.name]
        if kept.life.phase.is_running:
            if kept.child:
                kept.child.terminate()
            done, _ = await asyncio.wait([keeper], timeout=kept.spec.stop_timeout_s)
            if not done and kept.child:
                self._tell(kept, f"not stopped after {kept.spec.stop_timeout_s:.0f} s: killed")
                kept.child.kill()
                await asyncio.wait([keeper], timeout=_KILL_DEADLINE_S)
        keeper.cancel()

    # ------------------------------------------------------------------ what others see

    def _move(self, kept: _Kept, life: Life, *, write: bool = True) -> None:
        kept.life = life
        if write:
            self._write_state()

    def _tell(self, kept: _Kept, text: str) -> None:
        pid = f"pid {kept.child.pid}" if kept.child and kept.life.phase.is_running else ""
        clock = time.strftime("%H:%M:%S")
        self._report(f"{clock} {kept.spec.name:<10} {kept.life.phase.value:<10} {pid:<11} {text}".rstrip())

    def _show_log(self, kept: _Kept, *, num_lines: int = 20) -> None:
        if num_lines > 1:
            self._report(f"--- last lines of {kept.log}")
        for line in tail(kept.log, num_lines=num_lines):
            self._report(f"    {line}")

    def _write_state(self) -> None:
        """Replaces `up.json`: pids, addresses and phases, for people and for tests that kill."""
        state = {
            **self._about,
            "pid": os.getpid(),
            "services": {name: _as_json(kept) for name, kept in self._kept.items()},
        }
        partial = self._run_dir / ".up.json.partial"
        partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._run_dir / "up.json")


def _as_json(kept: _Kept) -> dict[str, Any]:
    return {
        "pid": kept.child.pid if kept.child else None,
        "state": kept.life.phase.value,
        "addresses": dict(kept.addresses),
        "starts": kept.life.starts,
        "exit_code": kept.life.exit_code,
        "log": str(kept.log),
    }


def _how_it_ended(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exited with {code}"
