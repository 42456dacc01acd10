"""Weight updates: the rules around a transfer, whatever carries the bytes.

    refuse outside a session (0.5.21) -> abort all if asked -> refuse a flush that would fail -> check names,
    shapes and dtypes -> receive into staging memory -> write between two forward passes -> name the version

Everything that can be refused is refused before the first byte; bytes land in staging memory, and only a
complete bucket is written, in one piece, by the scheduler thread. A refused or failed update therefore leaves
the weights as they were. (Buckets of one version are still several updates: the caller pauses around them.)

Updates are serialised by a lock. Lives on the event loop; the weights themselves belong to the scheduler
thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from milepost_engine import buckets
from milepost_engine.dialect import Dialect
from milepost_engine.disk import open_checkpoint, read_checkpoint
from milepost_engine.errors import InvalidRequest, Unavailable, UpdateRefused
from milepost_engine.groups import GroupRegistry
from milepost_engine.scheduler import Scheduler
from milepost_engine.shm import parse_descriptor, read_shm
from milepost_engine.weights import Checksums, TensorSpec, WeightStore

T = TypeVar("T")
MEMORY_TAGS = ("weights", "kv_cache")
_DISK_FORMATS = (None, "auto", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOptions:
    """What every update call may carry.

    Attributes:
        flush_cache: Drop cached KV afterwards; true when absent, as in SGLang, and refused with live
        requests.
        abort_all_requests: End all requests before anything else.
        weight_version: Name of the weights once they are written; None keeps the present name.
    """

    flush_cache: bool = True
    abort_all_requests: bool = False
    weight_version: str | None = None


class WeightUpdater:
    """Drives updates of one engine.

    Args:
        scheduler: Owner of the weights.
        weights: The weights.
        groups: The process groups.
        dialect: Whose rules hold.
        timeout_s: Deadline of one transfer, and of a command to the scheduler.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        weights: WeightStore,
        groups: GroupRegistry,
        *,
        dialect: Dialect,
        timeout_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._weights = weights
        self._groups = groups
        self._dialect = dialect
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._session_open = False
        self.released: frozenset[str] = frozenset()
        """Memory that was given up and not taken back, by tag."""

    async def run(self, function: Callable[[], T]) -> T:
        """Runs `function` on the scheduler thread, within the deadline."""
        try:
            return await asyncio.wait_for(
                asyncio.wrap_future(self._scheduler.call(function)), self._timeout_s
            )
        except TimeoutError as error:
            raise Unavailable(f"the scheduler did not answer within {self._timeout_s:g} s") from error

    # ---- sessions --------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Opens the session in which 0.5.21 takes updates."""
        if self._session_open:
            raise UpdateRefused("a weight update session is open already: call /end_weight_update first")
        self._session_open = True

    def end(self) -> None:
        """Closes the session."""
        if not self._session_open:
            raise UpdateRefused("no weight update session is open: call /begin_weight_update first")
        self._session_open = False

    def _require_session(self) -> None:
        if self._dialect.has_update_session and not self._session_open:
            raise UpdateRefused(
                f"no weight update session is open, and {self._dialect.name} takes updates only in one: "
                "call /begin_weight_update before and /end_weight_update after"
            )

    # ---- updates ---------------------------------------------------------------------------------------

    async def from_distributed(
        self, specs: Sequence[TensorSpec], *, group_name: str, load_format: str | None, options: UpdateOptions
    ) -> None:
        """Receives tensors, or one flattened bucket, by broadcast from rank 0 of a group."""
        if load_format not in (None, "flattened_bucket"):
            raise UpdateRefused(f"load_format is '{load_format}': it must be absent or 'flattened_bucket'")
        self._require_session()
        self._groups.require(group_name)

        async def receive() -> list[tuple[str, torch.Tensor]]:
            flattened = load_format == "flattened_bucket"
            return await self._groups.receive(
                group_name, specs, flattened=flattened, timeout_s=self._timeout_s
            )

        await self._update(specs, receive, options)

    async def from_shm(self, serialized: object, *, load_format: str | None, options: UpdateOptions) -> None:
        """Reads tensors from a shared-memory file that a JSON descriptor names."""
        if load_format not in (None, "flattened_bucket"):
            raise UpdateRefused(f"load_format is '{load_format}': it must be absent or 'flattened_bucket'")
        descriptor = parse_descriptor(serialized)

        async def receive() -> list[tuple[str, torch.Tensor]]:
            return await asyncio.to_thread(read_shm, descriptor)

        await self._update(descriptor.tensors, receive, options)

    async def from_disk(self, path: Path, *, load_format: str | None, options: UpdateOptions) -> None:
        """Reads every tensor from a folder of safetensors."""
        if load_format not in _DISK_FORMATS:
            raise UpdateRefused(f"load_format is '{load_format}': it must be 'auto', 'safetensors' or absent")
        self._require_session()
        checkpoint = await asyncio.to_thread(open_checkpoint, path)

        async def receive() -> list[tuple[str, torch.Tensor]]:
            return await asyncio.to_thread(read_checkpoint, checkpoint)

        await self._update(checkpoint.specs, receive, options, complete=True)

    async def _update(
        self,
        specs: Sequence[TensorSpec],
        receive: Callable[[], Awaitable[list[tuple[str, torch.Tensor]]]],
        options: UpdateOptions,
        *,
        complete: bool = False,
    ) -> None:
        self._require_session()
        async with self._lock:
            await self.run(lambda: self._prepare(specs, options, complete=complete))
            tensors = await receive()
            await self.run(lambda: self._apply(tensors, options))

    def _prepare(self, specs: Sequence[TensorSpec], options: UpdateOptions, *, complete: bool) -> None:
        self._weights.check(specs, complete=complete)
        if options.abort_all_requests:
            self._scheduler.abort(everything=True, message="Aborted by a weight update")
        self._require_flushable(options)

    def _apply(self, tensors: list[tuple[str, torch.Tensor]], options: UpdateOptions) -> None:
        self._require_flushable(options)  # requests may have come while the bytes did
        self._weights.write(tensors)
        if options.weight_version is not None:
            self._scheduler.set_weight_version(options.weight_version)
        self._settle_holds()

    def _require_flushable(self, options: UpdateOptions) -> None:
        if options.flush_cache and not self._scheduler.can_flush:
            raise UpdateRefused(
                f"flush_cache is true (its default) and {self._scheduler.num_live} requests are live: "
                "the cache flush would fail. Send flush_cache false, or abort_all_requests true"
            )

    # ---- versions, memory, checks ----------------------------------------------------------------------

    async def set_version(self, version: str, *, abort_all_requests: bool) -> None:
        """Names the weights."""

        def apply() -> None:
            if abort_all_requests:
                self._scheduler.abort(everything=True, message="Aborted by update_weight_version")
            self._scheduler.set_weight_version(version)

        await self.run(apply)

    async def release(self, tags: Sequence[str] | None) -> None:
        """Frees KV cache, weights or both. Generation stops until both are back.

        Raises:
            UpdateRefused: Requests run, or some of it is free already.
        """
        chosen = _tags(tags)

        def apply() -> None:
            if twice := chosen & self.released:
                raise UpdateRefused(f"memory is released already ({_words(twice)}): release it once")
            if self._scheduler.running:
                raise UpdateRefused(
                    f"memory cannot be released while {len(self._scheduler.running)} requests run: "
                    "pause_generation with mode abort or retract first"
                )
            if "kv_cache" in chosen:
                self._scheduler.release_kv()
            if "weights" in chosen:
                self._weights.release()
            self._scheduler.holds |= chosen
            self.released |= chosen

        await self.run(apply)

    async def resume(self, tags: Sequence[str] | None) -> None:
        """Takes memory back. Released weights must be updated before anything is generated.

        Raises:
            UpdateRefused: Some of it was not released.
        """
        chosen = _tags(tags)

        def apply() -> None:
            if never := chosen - self.released:
                raise UpdateRefused(f"memory was not released ({_words(never)}): resume what was, once")
            self.released -= chosen
            if "weights" in chosen:
                self._weights.resume()
            self._scheduler.holds -= chosen - {"weights"}
            self._settle_holds()

        await self.run(apply)

    def _settle_holds(self) -> None:
        if self._weights.state == "present":
            self._scheduler.holds.discard("weights")

    async def checker(self, action: str) -> Checksums | None:
        """SGLang's `/weights_checker`: snapshot, reset_tensors, compare, checksum."""
        if action == "checksum":
            return await self.run(self._weights.checksum)
        if action == "snapshot":
            await self.run(self._weights.snapshot)
        elif action == "reset_tensors":
            await self.run(self._weights.reset)
        elif action == "compare":
            differing = await self.run(self._weights.differing)
            if differing:
                raise UpdateRefused(f"{len(differing)} tensors differ from the snapshot: {differing[:10]}")
        else:
            raise InvalidRequest(
                f"action is '{action}': it must be snapshot, reset_tensors, compare, checksum or fits"
            )
        return None

    async def require_fit(
        self, names: Sequence[object], dtypes: Sequence[object], shapes: Sequence[object]
    ) -> None:
        """Refuses the tensors of a coming update unless they are all of the model's, in its shapes."""
        specs = self.tensor_specs(names, dtypes, shapes)
        await self.run(lambda: self._weights.check(specs, complete=True))

    async def read(self, name: str, *, rows: int) -> list[Any]:
        """The first rows of one tensor."""
        return await self.run(lambda: self._weights.read(name, rows=rows))

    def tensor_specs(
        self, names: Sequence[object], dtypes: Sequence[object], shapes: Sequence[object]
    ) -> list[TensorSpec]:
        """Reads the parallel lists of an update's header."""
        return buckets.header(names, dtypes, shapes)


def _words(tags: Iterable[str]) -> str:
    return ", ".join(sorted(tags))


def _tags(tags: Sequence[str] | None) -> set[str]:
    chosen = set(MEMORY_TAGS if tags is None else tags)
    unknown = chosen - set(MEMORY_TAGS)
    if unknown or not chosen:
        raise InvalidRequest(f"tags is {sorted(chosen)}: it must name some of {', '.join(MEMORY_TAGS)}")
    return chosen
