"""The scheduler: one thread that owns the model, the KV cache and every live generation.

    submit --> waiting (FIFO) --admit: prefill, first token--> running --decode step--> finished --> notify
                  ^                                               |
                  +------- retract (tokens kept, KV dropped) -----+

Between two forward passes the thread empties its inbox, so whatever `call` runs sees the model and the batch
at rest: weight copies, version changes, aborts and pauses need no lock and can never fall into a forward
pass.

    who               consumes        produces          waits for            unblocked by
    scheduler thread  inbox, waiting  tokens, `notify`  inbox, when idle     submit, call, stop
    event loop        `notify`        replies           a Listener           notify; at death, abort

Invariants: `running[r]` is row r of the cache; a live generation is in exactly one of `waiting` and
`running`; every generation submitted is closed exactly once, at the latest by `stop` or by the death of the
thread. An exception in a forward pass kills the thread on purpose: all generations are aborted, `on_death`
tells the process, which must exit.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch

from milepost_engine.errors import InvalidRequest, Unavailable
from milepost_engine.generation import FinishReason, Generation
from milepost_engine.runner import ModelRunner
from milepost_engine.sampling import Drawn, SamplingPlan, input_logprobs

logger = logging.getLogger(__name__)

PauseMode = Literal["abort", "retract", "in_place"]
T = TypeVar("T")
_IDLE_WAKE_S = 1.0
_PREFILL_DELAY_STEPS = 3


def _ignore(seconds: float) -> None:
    """Nobody wants to know how long requests take."""


class Scheduler:
    """Continuous batching over one model.

    Args:
        runner: The model; used by the scheduler thread alone once `start` was called.
        max_running: Rows of the batch.
        max_prefill_tokens: Padded tokens of one prefill batch (a longer prompt is prefilled alone).
        seed: Of the randomness of requests without a seed of their own.
        weight_version: The version string to begin with.
        notify: Called on the scheduler thread, once a step, with the generations that advanced (streams) or
            finished.
        on_death: Called on the scheduler thread when it dies of an exception.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_running: int,
        max_prefill_tokens: int,
        seed: int,
        weight_version: str,
        notify: Callable[[list[Generation]], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self.runner = runner
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        self.paused = False
        self.holds: set[str] = set()  # memory tags that are released or not yet filled: nothing may run
        self.weight_version = weight_version
        self.tokens_generated = self.prompt_tokens = self.cached_tokens = 0
        self.num_ended = self.num_aborted = 0
        self.on_ended: Callable[[float], None] = _ignore
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens
        self._notify = notify
        self._on_death = on_death
        self._generator = torch.Generator().manual_seed(seed)
        self._plan: SamplingPlan | None = None
        self._admitted: list[Generation] = []  # left `waiting`, not yet in `running`: during a prefill alone
        self._steps_since_prefill = 0
        self._advanced: list[Generation] = []
        self._inbox: queue.SimpleQueue[list[Generation] | Callable[[], None] | None] = queue.SimpleQueue()
        self._accepting = threading.Lock()
        self._closed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-scheduler", daemon=True)

    # ---- from any thread -------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """The thread runs and takes requests."""
        return self._thread.is_alive() and not self._closed

    def submit(self, generations: list[Generation]) -> None:
        """Queues generations; their listeners hear of them from now on.

        Raises:
            Unavailable: The scheduler has stopped.
        """
        self._put(generations)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs `function` on the scheduler thread between two forward passes.

        Returns:
            A future with its result, its exception, or Unavailable when the scheduler has stopped. A future
            cancelled before its turn is not run.
        """
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:  # the caller's, whatever it is; the thread lives on
                future.set_exception(error)

        try:
            self._put(command)
        except Unavailable as error:
            future.set_exception(error)
        return future

    def _put(self, item: list[Generation] | Callable[[], None]) -> None:
        with self._accepting:
            if self._closed:
                raise Unavailable("the scheduler has stopped: send the request to another engine")
            self._inbox.put(item)

    def stop(self, *, timeout_s: float) -> bool:
        """Aborts what is live and ends the thread.

        Returns:
            Whether it ended within `timeout_s`.
        """
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- on the scheduler thread: what `call` may run --------------------------------------------------

    @property
    def num_live(self) -> int:
        """Generations not yet finished."""
        return len(self.running) + len(self.waiting)

    @property
    def can_flush(self) -> bool:
        """No request holds KV, nor would get some next (under a pause the queue waits without KV)."""
        return not self.running and (self.paused or not self.waiting)

    def abort(self, *, rid: str = "", everything: bool = False, message: str = "Aborted by request") -> int:
        """Ends all generations, or those whose rid begins with `rid`; returns how many."""

        def hit(generation: Generation) -> bool:
            return everything or generation.rid.startswith(rid)

        return self._abort_where(hit, message)

    def abort_these(self, generations: list[Generation], *, message: str) -> int:
        """Ends the given generations where they are still live."""
        wanted = {id(generation) for generation in generations}
        return self._abort_where(lambda generation: id(generation) in wanted, message)

    def _abort_where(self, hit: Callable[[Generation], bool], message: str) -> int:
        reason = FinishReason("abort", message=message)
        rows = [row for row, generation in enumerate(self.running) if hit(generation)]
        queued = [generation for generation in self.waiting if hit(generation)]
        for generation in [*(self.running[row] for row in rows), *queued]:
            self._close(generation, reason)
        if queued:
            self.waiting = deque(generation for generation in self.waiting if not hit(generation))
        self._drop(rows)
        return len(rows) + len(queued)

    def pause(self, mode: PauseMode) -> None:
        """Stops forward passes; what happens to live generations depends on the mode (see the README)."""
        self.paused = True
        if mode == "abort":
            self.abort(everything=True, message="Aborted by pause_generation")
        elif mode == "retract":
            self.retract()

    def resume(self) -> None:
        """Ends a pause; without one, nothing happens."""
        self.paused = False

    def retract(self) -> None:
        """Sends the running generations back to the head of the queue, tokens kept, KV dropped."""
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        self.runner.cache.clear()
        self._plan = None

    def set_weight_version(self, version: str) -> None:
        """Names the weights of the tokens drawn from now on."""
        if version == self.weight_version:
            return
        for generation in (*self.running, *self.waiting):
            generation.mark_version(self.weight_version)
        self.weight_version = version

    # ---- the loop --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._read_inbox()
                if self._runnable and not self._stopping:
                    self._step()
                self._flush_notices()
        except BaseException as error:
            logger.exception("the scheduler dies")
            self._shut("the engine's scheduler died")
            self._on_death(error)
        else:
            self._shut("the engine is shutting down")

    @property
    def _runnable(self) -> bool:
        return not self.paused and not self.holds and bool(self.running or self.waiting)

    def _read_inbox(self) -> None:
        """Runs what is queued; waits for the first item when there is nothing to compute."""
        try:
            item = self._inbox.get_nowait() if self._runnable else self._inbox.get(timeout=_IDLE_WAKE_S)
            while True:
                self._handle(item)
                item = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _handle(self, item: list[Generation] | Callable[[], None] | None) -> None:
        if item is None:
            self._stopping = True
        elif isinstance(item, list):
            self.waiting.extend(item)
        else:
            item()

    def _shut(self, message: str) -> None:
        """Takes no more, answers everyone: no caller is left waiting."""
        with self._accepting:
            self._closed = True
        try:
            while True:
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass
        for generation in (*self.running, *self._admitted, *self.waiting):
            self._close(generation, FinishReason("abort", message=message))
        self.running.clear()
        self.waiting.clear()
        self._flush_notices()

    def _flush_notices(self) -> None:
        if self._advanced:
            self._notify(self._advanced)
            self._advanced = []

    # ---- one step --------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._admitted = self._admit() if self._prefill_is_due else []
        if self._admitted:
            self._steps_since_prefill = 0
            self._prefill(self._admitted)
            self._admitted = []
        elif self.running:
            self._steps_since_prefill += 1
            self._decode()

    @property
    def _prefill_is_due(self) -> bool:
        """Few arrivals wait a few steps for others: a prefill of many costs little more than of one."""
        few = 4 * len(self.waiting) < len(self.running)
        return not few or self._steps_since_prefill >= _PREFILL_DELAY_STEPS

    def _admit(self) -> list[Generation]:
        """Takes from the queue what fits: free rows, and a bound on the padded tokens of one prefill."""
        batch: list[Generation] = []
        free, longest, distinct = self._max_running - len(self.running), 0, 0
        previous: list[int] | None = None
        while self.waiting and len(batch) < free:
            head = self.waiting[0]
            if head.max_new_tokens == 0 and not head.logprobs.of_input:
                self._close(self.waiting.popleft(), FinishReason("length", length=0))
                continue
            distinct += head.prompt_ids is not previous
            longest = max(longest, len(head.prompt_ids) + len(head.output_ids))
            if batch and longest * distinct > self._max_prefill_tokens:
                break
            previous = head.prompt_ids
            batch.append(self.waiting.popleft())
        return batch

    def _prefill(self, batch: list[Generation]) -> None:
        prompts: list[list[int]] = []
        index_of: dict[tuple[int, ...], int] = {}
        source: list[int] = []
        now = time.perf_counter()
        for generation in batch:
            generation.admitted_s = generation.admitted_s or now
            tokens = (*generation.prompt_ids, *generation.output_ids)
            if tokens in index_of and not generation.output_ids:
                generation.cached_tokens = len(generation.prompt_ids)
            source.append(index_of.setdefault(tokens, len(prompts)))
            if source[-1] == len(prompts):
                prompts.append(list(tokens))
        wants_input = [g for g in batch if g.logprobs.of_input and g.input_logprobs is None]
        result = self.runner.prefill(prompts, source=source, all_logits=bool(wants_input))
        for generation in wants_input:
            assert result.all is not None
            self._score_prompt(generation, result.all[source[batch.index(generation)]])
        first_row = len(self.running)
        self.running.extend(batch)
        self._plan = None
        drawn = SamplingPlan(batch, shared=self._generator).draw(result.last)
        self._record(batch, drawn, first_row=first_row)

    def _score_prompt(self, generation: Generation, logits: torch.Tensor) -> None:
        options = generation.logprobs
        generation.input_logprobs, generation.input_top = input_logprobs(
            logits, generation.prompt_ids, start=options.start_len, top=options.top
        )

    def _decode(self) -> None:
        logits = self.runner.decode([generation.output_ids[-1] for generation in self.running])
        if self._plan is None:
            self._plan = SamplingPlan(self.running, shared=self._generator)
        self._record(self.running, self._plan.draw(logits), first_row=0)

    def _record(self, rows: list[Generation], drawn: Drawn, *, first_row: int) -> None:
        """Appends one token to each row and ends the rows that it completes."""
        done: list[int] = []
        for offset, generation in enumerate(rows):
            if generation.max_new_tokens == 0:  # prompt log-probs were all that was asked
                self._close(generation, FinishReason("length", length=0))
                done.append(first_row + offset)
                continue
            if drawn.top is not None:
                generation.output_top.append(drawn.top[offset])
            generation.output_logprobs.append(drawn.logprobs[offset])
            generation.output_ids.append(drawn.tokens[offset])
            reason = generation.end_of(drawn.tokens[offset])
            if reason is not None:
                self._close(generation, reason)
                done.append(first_row + offset)
            elif generation.stream:
                self._advanced.append(generation)
        self.tokens_generated += len(rows)
        self._drop(done)

    def _close(self, generation: Generation, reason: FinishReason) -> None:
        if generation.finish is None:
            generation.close(reason, version=self.weight_version)
            self._advanced.append(generation)
            self._count(generation, reason)

    def _count(self, generation: Generation, reason: FinishReason) -> None:
        self.num_ended += 1
        self.num_aborted += reason.kind == "abort"
        self.prompt_tokens += len(generation.prompt_ids)
        self.cached_tokens += generation.cached_tokens
        self.on_ended(generation.finished_s - generation.created_s)

    def _drop(self, rows: list[int]) -> None:
        if not rows:
            return
        for hole, mover in self.runner.cache.remove(rows):
            self.running[hole] = self.running[mover]
        del self.running[self.runner.cache.count :]
        self._plan = None

    # ---- memory ----------------------------------------------------------------------------------------

    def release_kv(self) -> None:
        """Gives the KV memory back.

        Raises:
            InvalidRequest: Requests are running; pause (abort or retract) first.
        """
        if self.running:
            raise InvalidRequest(
                f"kv_cache cannot be released while {len(self.running)} requests run: "
                "pause_generation with mode abort or retract first"
            )
        self.runner.cache.release()

    def stats(self) -> dict[str, Any]:
        """Counters for `/server_info`."""
        return {
            "num_running_reqs": len(self.running),
            "num_waiting_reqs": len(self.waiting),
            "is_paused": self.paused,
            "tokens_generated": self.tokens_generated,
            "kv_cache_bytes": self.runner.cache.size_bytes,
        }
