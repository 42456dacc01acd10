"""The step loop of rank 0: the trainer's order of things, as LEDGER rules it.

    resume:  fence (new term) -> newest valid checkpoint c (or save checkpoint 0) -> state c to the ledger
    step s:  lease(s) -> [micro-batches -> optimizer] * updates -> commit(s) -> publish -> checkpoint -> trim
    end:     sources exhausted, num_steps reached or stopped -> publish -> checkpoint -> (export, account)

    what runs                 consumes                   waits for              unblocked by
    wait for lease            groups of step s           step s being full      gateways sealing groups
    prefetch of s + 1         groups of step s + 1       the same               the same; never past num_steps
    publisher.catch_up        weights at rest            engines, the router    its deadline; backs off then
    checkpoint                weights at rest            the disk               itself

Weights are at rest everywhere but inside ``finish_update``; between two updates of one step they belong to no
label, so publication happens before the first update of a step, after the last, and while waiting. Replay is
silent: the publisher keeps quiet below the label that was published before the crash.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from milepost import types as t
from milepost.errors import FailedPrecondition, OutOfRange, StaleTerm
from milepost_common.telemetry import logs, tracing
from milepost_trainer.crew import Crew, StepOrder, StepStart
from milepost_trainer.learner import UpdateReport
from milepost_trainer.ledger import Ledger
from milepost_trainer.logprob_check import LogprobCheck
from milepost_trainer.meters import StepMeter
from milepost_trainer.metrics import shortage_notes, step_metrics
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.publisher import Published, Publisher
from milepost_trainer.recorder import Recorder
from milepost_trainer.saver import Saver, export_dir
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.shortage import Shortage
from milepost_trainer.spans import StepTrace, tracing_step
from milepost_trainer.status import TrainerState
from milepost_trainer.timing import StepClock

log = logging.getLogger(__name__)

T = TypeVar("T")
_BREATH_S = 0.01
_ON_GAP = {"fail": t.OnGap.FAIL, "regenerate": t.OnGap.REGENERATE, "drop": t.OnGap.DROP}


class StepLoop:
    """Trains step after step until there is nothing left or it is told to stop.

    Args:
        settings: the trainer's.
        ledger: the run's account.
        crew: the ranks.
        publisher: gives weights to engines.
        saver: checkpoints.
        recorder: metrics and step log.
        state: what others see and ask for.
        stop: set when the trainer shall end.
        logprobs: looks at engines after each publication; None: nobody does.

    Attributes:
        meter: the last step as metrics.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        *,
        ledger: Ledger,
        crew: Crew,
        publisher: Publisher,
        saver: Saver,
        recorder: Recorder,
        state: TrainerState,
        stop: asyncio.Event,
        logprobs: LogprobCheck | None = None,
    ) -> None:
        self._settings, self._logprobs = settings, logprobs
        self._ledger = ledger
        self._crew = crew
        self._publisher = publisher
        self._saver = saver
        self._recorder = recorder
        self._state = state
        self._stop = stop
        self._world_size = state.world_size
        self._committed_before = 0  # by an earlier term: steps up to here are replayed
        self._poison_step = 0  # was resumed again and again without a commit; 0: none
        self._leases: dict[int, asyncio.Task[t.StepLease]] = {}
        self._run: t.RunConfig = t.RunConfig()
        self._clock = StepClock()
        self._max_tokens = settings.max_tokens_per_micro_batch  # less, once some rank ran out of memory
        self.meter = StepMeter()

    # ------------------------------------------------------------------ resume

    async def resume(self) -> None:
        """Become the run's only trainer, with the weights of its newest checkpoint.

        Raises:
            DataLoss: payloads after the checkpoint are gone and `on_gap` is fail.
        """
        self._run = (await self._ledger.create_run()).config
        fenced = await self._ledger.open_term()
        self._state.term = fenced.term
        meta = await self._saver.newest()
        if meta is None:
            self._state.checkpoint = await self._saver.save_initial()
        else:
            self._state.checkpoint = await self._saver.load(meta)
        step = self._state.checkpoint.step
        point = await self._ledger.state_checkpoint(
            step, manifest=meta.manifest if meta else (), on_gap=_ON_GAP[self._settings.on_gap]
        )
        self._poison_step = point.poison_step
        self._committed_before = fenced.committed_step
        self._state.step = step
        published = Published(fenced.published_version, fenced.published_label)
        self._publisher.start(term=fenced.term, label=step, published=published)
        log.info("term %d from checkpoint %d; committed %d", fenced.term, step, fenced.committed_step)

    # ------------------------------------------------------------------ running

    async def run(self) -> bool:
        """Train until the end of the run or a stop, then leave everything as a successor wants it.

        Returns:
            False when the run is over and not one of the prompts that it accepted was trained.
        """
        finished = False
        await self._publisher.give_back()
        try:
            while not (finished := self._reached_the_end()) and await self._may_start():
                step = self._state.step + 1
                self._clock = StepClock()
                lease = await self._await_lease(step)
                if lease is None or not await self._may_start():
                    break
                await self._train(step, lease)
        except OutOfRange:
            finished = True
        finally:
            for task in self._leases.values():
                task.cancel()
            await asyncio.gather(*self._leases.values(), return_exceptions=True)
        return await self._end(finished=finished)

    def _reached_the_end(self) -> bool:
        return 0 < self._settings.num_steps <= self._state.step

    async def _may_start(self) -> bool:
        """Wait while paused; False when told to stop."""
        while self._state.paused and not self._stop.is_set():
            self._state.enter("paused")
            await self._tend()
        return not self._stop.is_set()

    async def _await_lease(self, step: int) -> t.StepLease | None:
        """The groups of a step; None when told to stop before they came."""
        try:
            return await self._await_leasing(self._begin_lease(step), step)
        except StaleTerm:
            raise
        except FailedPrecondition as error:  # asked ahead, while Redis had forgotten the step before it
            log.warning("step %d is leased again: %s", step, error)
            return await self._await_leasing(self._begin_lease(step), step)

    async def _await_leasing(self, task: asyncio.Task[t.StepLease], step: int) -> t.StepLease | None:
        with self._clock.timing("wait"):
            while not task.done():
                phase = "paused" if self._state.paused else "waiting"
                self._state.enter(phase, f"the groups of step {step}")
                if await self._tend(task):
                    return None
        del self._leases[step]
        return task.result()

    def _begin_lease(self, step: int) -> asyncio.Task[t.StepLease]:
        if step not in self._leases:
            self._leases[step] = asyncio.create_task(self._lease_and_fetch(step), name=f"lease {step}")
        return self._leases[step]

    async def _lease_and_fetch(self, step: int) -> t.StepLease:
        """Lease a step, plan it and have every rank begin to fetch its part."""
        lease = await self._ledger.lease(step, max_wait_s=self._settings.lease_wait_s)
        self._run = (await self._ledger.read_run()).config
        if step == self._poison_step:
            log.error("%s", _poison_in_words(lease, step, dropped=self._drops(step)))
            if self._drops(step):
                return lease
        plan = plan_step(
            step,
            [GroupInfo(group.prompt_id, group.num_tokens) for group in lease.groups],
            num_ranks=self._world_size,
            updates=self._settings.updates_per_step,
            max_tokens=self._max_tokens,
        )
        sampling = self._run.sampling
        temperature = sampling.temperature if sampling and sampling.temperature is not None else 1.0
        order = StepOrder(plan, default_temperature=temperature, transcripts=self._transcripts(step))
        await self._crew.call("fetch", order)
        return lease

    def _drops(self, step: int) -> bool:
        """The step is left out: it killed the trainer again and again, and that is what the settings say."""
        return step == self._poison_step and self._settings.on_poison == "drop"

    def _transcripts(self, step: int) -> str:
        every = self._settings.metrics.transcripts_every
        return str(self._recorder.directory / "transcripts") if every and step % every == 0 else ""

    async def _tend(self, task: asyncio.Task[Any] | None = None, *, timeout_s: float = math.inf) -> bool:
        """Wait for a task or for something to happen, and publish and save as wanted.

        Args:
            task: what is waited for; None waits for events only.
            timeout_s: come back after this long in any case.

        Returns:
            True when told to stop.
        """
        state, publisher = self._state, self._publisher
        full = self._ledger.full
        if self._settings.offload == "all":
            await self._crew.rest()
        events = [asyncio.create_task(e.wait()) for e in (self._stop, publisher.changed, state.woken, full)]
        try:
            await asyncio.wait(
                [*events, task] if task else events,
                timeout=min(timeout_s, publisher.retry_in_s + _BREATH_S),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for event in events:
                event.cancel()
        state.woken.clear()
        publisher.changed.clear()  # what changed is looked at below; unheard, it would end every later wait
        if self._stop.is_set():
            return True
        if task is None or not task.done():
            await self._publish()
        if full.is_set():
            full.clear()
            state.save_wanted = True
        if state.save_wanted:
            await self._save()
        return False

    # ------------------------------------------------------------------ one step

    async def _train(self, step: int, lease: t.StepLease) -> None:
        """Train, commit, publish and save one step."""
        if self._settings.prefetch and step != self._settings.num_steps:
            self._begin_lease(step + 1)
        run_id, replayed = self._settings.run.run_id, step <= self._committed_before
        with (
            logs.about(run=run_id, step=step),
            tracing_step(run_id, step=step, groups=lease.groups, replayed=replayed) as trace,
        ):
            await self._train_traced(step, lease, trace)

    async def _train_traced(self, step: int, lease: t.StepLease, trace: StepTrace) -> None:
        self._state.enter("training")
        if self._drops(step):
            await self._commit(step, lease, {}, poison=True)
            trace.committed({group.prompt_id: "the step killed the trainer" for group in lease.groups})
            self._publisher.moved_to(step, due=True)
            await self._save()
            return
        async with self._publisher.borrowing():
            refused = await self._start(step)
            updates = await self._make_updates(step, lease)
        await self._commit(step, lease, refused, updates=updates)
        trace.committed(refused)
        self._publisher.moved_to(step, due=self._publishes(step))
        with self._clock.timing("publish"):
            await self._publish()
        checked = await self._check(step) if self._logprobs is not None else {}
        with self._clock.timing("checkpoint"):
            if step % self._settings.checkpoint.every == 0 or self._save_is_wanted():
                await self._save()
        self._report(step, lease.groups, updates, dropped=len(refused), more=checked)

    async def _check(self, step: int) -> dict[str, float | None]:
        """What engines make of the weights of this step, if they have them."""
        if self._logprobs is None or self._publisher.published.label != step:
            return {}
        worst = await self._logprobs.run(step, await self._publisher.serving())
        return {"train/engine_logprob_abs_diff": worst}

    async def _start(self, step: int) -> Mapping[str, str]:
        """Wait for the step's data; returns the groups that are left out, each with the reason."""
        with self._clock.timing("wait"):
            start: StepStart = await self._crew.call("start_step", step)
        self._clock.add("fetch", start.fetch_s)
        self._clock.add("pack", start.pack_s)
        return start.refused

    async def _make_updates(self, step: int, lease: t.StepLease) -> list[UpdateReport]:
        count = min(self._settings.updates_per_step, len(lease.groups))
        reports: list[UpdateReport] = []
        for update in range(count):
            while not await self._gather_gradients(step, update):
                pass
            with self._clock.timing("optimizer"):
                finishing = self._crew.call("finish_update")
                if update == count - 1 and self._publishes(step):
                    finishing = self._publisher.while_made(step, finishing)
                report: UpdateReport = await finishing
            if report.skipped:
                log.warning("step %d: gradient norm %s: update skipped", step, report.grad_norm)
            self._max_tokens = min(self._max_tokens, report.max_tokens)
            reports.append(report)
        return reports

    def _publishes(self, step: int) -> bool:
        return step % (self._run.publish_every or 1) == 0

    async def _gather_gradients(self, step: int, update: int) -> bool:
        """All micro-batches of an update; False where a rank had no memory for one, and all begin again."""
        num_micro_batches: int = await self._crew.call("start_update", update)
        for index in range(num_micro_batches):
            if update == 0 and index > 0:
                with self._clock.timing("publish"):
                    await self._publish()
            with self._clock.timing("forward_backward"):
                short: Shortage | None = await self._crew.call("train_micro_batch", index)
            if short is not None:
                log.warning("step %d is begun again: %s", step, short)
                return False
        return True

    async def _commit(
        self,
        step: int,
        lease: t.StepLease,
        refused: Mapping[str, str],
        *,
        poison: bool = False,
        updates: Sequence[UpdateReport] = (),
    ) -> None:
        for prompt_id, why in refused.items():
            log.warning("step %d leaves group %s out: %s", step, prompt_id, why)
        prompt_ids = tuple(group.prompt_id for group in lease.groups)
        reason = t.DropReason.POISON if poison else t.DropReason.INVALID
        left_out = prompt_ids if poison else sorted(refused)
        entry = t.StepManifest(
            step=step,
            prompt_ids=prompt_ids,
            dropped=tuple(t.DroppedGroup(prompt_id=p, reason=reason) for p in left_out),
        )
        await self._ledger.commit(entry)
        self._recorder.write_commit(entry, term=self._state.term, notes=shortage_notes(updates))
        self._state.step = step

    def _report(
        self,
        step: int,
        groups: Sequence[t.StepGroup],
        updates: Sequence[UpdateReport],
        *,
        dropped: int,
        more: Mapping[str, float | None],
    ) -> None:
        metrics = step_metrics(
            groups=groups,
            updates=updates,
            times=self._clock.read(),
            weight_version=self._publisher.published.version,
            term=self._state.term,
            dropped=dropped,
            replayed=step <= self._committed_before,
            wall_time=time.time(),
        ) | dict(more)
        self._recorder.write_metrics(step, metrics)
        log.info("step %d committed: %d groups, loss %.4f", step, len(groups), updates[-1].loss)
        staleness = [group.staleness for group in groups]
        self.meter.trained(metrics, staleness=staleness, replayed=step <= self._committed_before)
        self._state.add_step(step, {name: value for name, value in metrics.items() if value is not None})

    # ------------------------------------------------------------------ publishing and saving

    async def _publish(self) -> None:
        """Give engines what they lack, unless told to stop meanwhile."""
        if (point := self._ledger.restated) is not None:
            self._ledger.restated = None
            self._publisher.forgotten(Published(point.published_version, point.published_label))
            self._state.save_wanted = (
                True  # payloads of restated steps may be gone: only the weights hold them
            )
        if not self._publisher.wanted:
            return
        run_id, label = self._settings.run.run_id, self._publisher.label
        with (
            logs.about(run=run_id, step=label),
            tracing.span("trainer.publish", begins=True, run_id=run_id, label=label) as span,
        ):
            async with self._phase("publishing"):
                await self._unless_stopped(self._publisher.catch_up())
            span.set(version=self._publisher.published.version)
        self._state.published_step = self._publisher.published.label or 0
        self._state.weight_version = self._publisher.published.version

    def _save_is_wanted(self) -> bool:
        return self._state.save_wanted or self._ledger.checkpoint_wanted

    async def _save(self) -> None:
        """Save a checkpoint of the committed step, if there is none yet."""
        state = self._state
        if state.checkpoint.step != state.step:
            async with self._phase("saving"):
                try:
                    state.checkpoint = await self._saver.save(state.step)
                except OSError as error:
                    log.error("checkpoint of step %d not saved: %s", state.step, error)
        state.save_wanted = False
        state.announce()

    async def _end(self, *, finished: bool) -> bool:
        """Publish what is due and save; if the run is finished, export and account for its prompts."""
        deadline = time.monotonic() + self._settings.publish.timeout_s
        if finished:
            self._publisher.moved_to(self._state.step, due=True)
        while finished and self._publisher.lacking and (left := deadline - time.monotonic()) > 0:
            self._state.enter("publishing", "engines for the last weights")
            if await self._tend(timeout_s=left):
                break
        await self._save()
        path = export_dir(self._settings.export_dir, self._settings.checkpoint.dir)
        if finished:
            await self._crew.call("export", str(path))
        self._state.enter("finished")
        if not finished:
            return True
        stats = await self._unless_stopped(self._ledger.read_stats())
        if stats is None:
            return True
        log.info("run finished after step %d; model in %s; %s", self._state.step, path, in_words(stats))
        return bool(stats.trained) or not stats.accepted

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """Await something, or cancel it when told to stop."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return None
        finally:
            stopped.cancel()

    @asynccontextmanager
    async def _phase(self, name: str) -> AsyncGenerator[None]:
        before, waiting = self._state.phase, self._state.waiting_for
        self._state.enter(name)
        try:
            yield
        finally:
            self._state.enter(before, waiting)


def _poison_in_words(lease: t.StepLease, step: int, *, dropped: bool) -> str:
    """A step that killed the trainer, with its prompts, the longest first, and what becomes of them."""
    groups = sorted(lease.groups, key=lambda group: -sum(group.num_tokens))
    names = ", ".join(f"{group.prompt_id} ({sum(group.num_tokens)} tokens)" for group in groups)
    what = (
        "its prompts are dropped with reason poison"
        if dropped
        else ('it is tried again; set [trainer] on_poison = "drop" to leave its prompts out')
    )
    return f"step {step} was resumed three times without a commit: {names}; {what}"


def in_words(stats: t.RunStats) -> str:
    """What became of the run's prompts: trained, dropped by reason, still in flight."""
    counts = {
        "dropped": sum(stats.dropped.values()),
        "in flight": stats.waiting + stats.rolling + stats.ready + stats.assigned,
    }
    why = ", ".join(f"{reason} {n}" for reason, n in sorted(stats.dropped.items()) if n)
    parts = [f"{n} {name}" + (f" ({why})" if name == "dropped" else "") for name, n in counts.items() if n]
    return ", ".join((f"{stats.trained} of {stats.accepted} prompts trained", *parts))
