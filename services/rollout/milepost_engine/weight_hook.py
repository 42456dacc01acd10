"""Weights into SGLang's model, in its own process: what `--custom-weight-loader` names and engines call.

    update_weights_from_tensor(load_format="milepost_engine.weight_hook.load")
        [(order, -), (segment, handle), ...] ──> load(model, ...) ──> report, read at /get_weights_by_name

An order names a layout: where the trainer's tensors lie in segments of its memory. The first order of a
layout brings the handles and is done by the model's own `load_weights`, while every copy that this makes is
recorded: fused projections, tensor-parallel shards and padding come out right because nobody here knows of
them. If all it did was to copy out of the trainer's tensors, the recording is a plan. It is proven once (what
it writes is spoilt, then written by the plan, and must hash as before) and from then on an order is a signal:
the handles stay open and a few copies are all there is to do. A model whose loader does more than copy is
loaded by it each time. What is open must be the trainer's memory and no copy of it: each order has another
stamp, which is read there first.

A signal may also come as a read of `milepost.signal:<order>` (below), which SGLang does between two steps of
a running engine. So a signal is done, or refused before its first byte is written, or ends the process
(`_whole_or_never`), and SGLang with it.

Else `load` never raises, for SGLang would die of it. Whether it did its work, the engine says itself: the
model is given a reader of the name `milepost.report` (its bytes as numbers, since SGLang passes floats
alone), for the router to ask; without a report of its transaction it takes the engine for failed. On several
ranks the report is that of all of them.

State is of the process: the plan of each model, with the trainer's memory mapped, until another layout comes.
Torch and the standard library alone are imported here, by `copy_table` too, and Triton where it works.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from milepost_engine import copy_table
from milepost_engine.copy_table import Copies

log = logging.getLogger(__name__)

REPORT, CHECKSUM, SIGNAL = "milepost.report", "milepost.checksum", "milepost.signal:"
STAMP = "stamp"
LARGE_BYTES = 16 << 20
"""From here on a tensor is copied by itself, where the kernel does not take it; smaller ones go together."""
_CHUNK = 1 << 24

_copy_many: Any = getattr(torch, "_foreach_copy_")  # noqa: B009  (one kernel for many tensors; torch has no other)


@dataclass(frozen=True)
class Place:
    """Where one tensor of the trainer lies.

    Attributes:
      name: Hugging Face name.
      shape, dtype: as it lies there.
      wire_dtype: as the model's loader is to see it.
      segment, offset_bytes: of which segment, and where in it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    wire_dtype: str
    segment: str
    offset_bytes: int


@dataclass(frozen=True)
class Order:
    """One update.

    Attributes:
      transaction: whose report it gets.
      layout: name of the layout.
      places: of every tensor; empty: as when this layout was last sent.
      stamp: what lies in the segment of that name; 0: nothing is known of it.
      pushed: how its tensors come, where they are broadcast (see `weight_receiver`); empty: they lie there.
    """

    transaction: str
    layout: str
    places: tuple[Place, ...] = ()
    stamp: int = 0
    pushed: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def read(cls, text: str) -> Order:
        """Reads what the trainer wrote."""
        said = json.loads(text)
        places = tuple(Place(name, tuple(shape), *rest) for name, shape, *rest in said.get("places", ()))
        return cls(said["transaction"], said["layout"], places, said.get("stamp", 0), said.get("pushed", {}))


@dataclass
class Plan:
    """How a layout gets into a model.

    Attributes:
      layout: its name.
      sources: the trainer's tensors by name, and the dtypes in which the loader is to see them.
      stamp: where the trainer writes the stamp of its order; None: it does not.
      table: what one kernel copies: what needs no cast, on a GPU; None: nothing.
      large, small: what else is copied where, singly and in groups of one pair of dtypes.
      refused: why the model's own loader is used instead; empty: it is not.
    """

    layout: str
    sources: dict[str, tuple[torch.Tensor, torch.dtype]]
    stamp: torch.Tensor | None = None
    table: copy_table.Table | None = None
    large: Copies = field(default_factory=Copies)
    small: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(
        default_factory=list[tuple[list[torch.Tensor], list[torch.Tensor]]]
    )
    refused: str = ""

    @property
    def num_copies(self) -> int:
        """Copies that are enqueued."""
        return len(self.large) + len(self.small) + (self.table is not None)

    def run(self, model: nn.Module) -> None:
        """Writes the model's weights; returns once copies are enqueued."""
        if self.refused:
            load_weights(model, self.sources)
            return
        if self.table is not None:
            self.table.run()
        for targets, sources in self.small:
            _copy_many(targets, sources, non_blocking=True)
        for target, origin in self.large:
            target.copy_(origin, non_blocking=True)


@dataclass
class _State:
    """What this process knows of one model."""

    plan: Plan | None = None
    report: dict[str, Any] = field(default_factory=dict[str, Any])


_states: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def load(model: nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Does one order; never raises.

    Args:
      model: SGLang's.
      named_tensors: the order's text with anything, then the segments by name.
    """
    _load(model, named_tensors[0][0] if named_tensors else "", named_tensors[1:])


def _load(
    model: nn.Module, text: str, segments: Sequence[tuple[str, torch.Tensor]], *, signalled: bool = False
) -> None:
    """Does one order; never raises, but ends the process where it was `signalled` and is done in part."""
    begun = time.perf_counter()
    state = _state_of(model)
    state.report = {"transaction": "", "ok": False, "message": "it did not end"}
    try:
        order = Order.read(text)
        state.report["transaction"] = order.transaction
        with torch.no_grad():
            planned = _do(model, state, order, dict(segments), signalled=signalled)
            _synchronize(model)
        report = {"ok": True, "message": "", "planned": planned}
    except Exception as error:
        log.exception("weights were not loaded")
        state.plan = None
        report = {"ok": False, "message": f"{type(error).__name__}: {error}"[:500], "planned": False}
    report = {"transaction": state.report["transaction"], **report, "seconds": time.perf_counter() - begun}
    state.report = _of_all_ranks(model, report)


def _do(
    model: nn.Module,
    state: _State,
    order: Order,
    segments: Mapping[str, torch.Tensor],
    *,
    signalled: bool,
) -> bool:
    """Writes the weights of an order; returns whether by a plan."""
    _synchronize(model)  # a forward pass may still run, on a stream of its own
    if order.pushed:
        from milepost_engine import weight_receiver  # it stands on this module

        return weight_receiver.receive(model, order.layout, order.pushed)
    if order.places:
        state.plan = None  # lets go of what an earlier trainer shared, before more is mapped
        stamp = segments.get(STAMP)
        _require_live(stamp, order)
        sources = {place.name: source(place, segments) for place in order.places}
        state.plan = make_plan(model, order.layout, sources)
        state.plan.stamp = stamp
        return False
    if state.plan is None or state.plan.layout != order.layout:
        held = state.plan.layout if state.plan else "none"
        raise LookupError(f"layout {order.layout} is not known here ({held} is); send its tensors again")
    _require_live(state.plan.stamp, order)
    if not signalled:
        state.plan.run(model)
        return not state.plan.refused
    if state.plan.refused:
        raise LookupError(f"a signal is for a plan, and there is none: {state.plan.refused}; send an order")
    with _whole_or_never():
        state.plan.run(model)
        _synchronize(model)
    return True


@contextmanager
def _whole_or_never() -> Generator[None]:
    """Ends the process where its block fails: weights that are written in part must not generate."""
    try:
        yield
    except BaseException:
        try:
            log.critical("weights were written in part: this engine ends", exc_info=True)
        finally:
            os._exit(1)


def _require_live(stamp: torch.Tensor | None, order: Order) -> None:
    """What is open is the trainer's memory: its last order is written there."""
    if stamp is not None and order.stamp and (found := int(stamp.item())) != order.stamp:
        raise LookupError(
            f"the trainer's memory is not what is read here: order {order.stamp} is not in it but {found}, "
            "as in a copy of it; publish by nccl, or report this with the version of SGLang"
        )


def source(place: Place, segments: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.dtype]:
    """A tensor where it lies, and the dtype in which the loader is to see it."""
    dtype: torch.dtype = getattr(torch, place.dtype)
    flat = segments[place.segment].reshape(-1).view(torch.uint8)
    size = torch.Size(place.shape).numel() * dtype.itemsize
    raw = flat[place.offset_bytes : place.offset_bytes + size]
    if (flat.storage_offset() + place.offset_bytes) % dtype.itemsize:
        raise ValueError(f"tensor {place.name!r} lies at byte {place.offset_bytes}, across its elements")
    return raw.view(dtype).reshape(place.shape), getattr(torch, place.wire_dtype)


# ---------------------------------------------------------------------------------------------- planning


def load_weights(model: nn.Module, sources: Mapping[str, tuple[torch.Tensor, torch.dtype]]) -> None:
    """Has the model's own loader take the tensors, one after another, in the dtypes that it is to see."""
    loader: Any = model
    loader.load_weights((name, source.to(wire)) for name, (source, wire) in sources.items())


def make_plan(model: nn.Module, layout: str, sources: dict[str, tuple[torch.Tensor, torch.dtype]]) -> Plan:
    """Loads the tensors by the model's own loader, and learns from it how to do it again.

    The weights are loaded when it returns, whether it is a plan or says why there is none.
    """
    plan = Plan(layout, sources)
    recorder = _Recorder(model)
    loader: Any = model
    with recorder:
        loader.load_weights(recorder.watch(sources))
    plan.refused = recorder.refused
    if not plan.refused:
        _sort(plan, recorder.copies)
        plan.refused = _disproof(model, plan, [target for target, _ in recorder.copies])
    if plan.refused:
        log.warning("this model is loaded by its own loader each time: %s", plan.refused)
    return plan


class _Recorder(TorchDispatchMode):
    """Sees every operation of a loader; keeps its copies out of the tensors that it is handed.

    Attributes:
      copies: (where to, where from), in order.
      refused: the first operation that copies cannot stand for; empty: none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.copies: Copies = []
        self.refused = ""
        self._owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._shown: torch.Tensor | None = None
        self._source: torch.Tensor | None = None
        self._ours = False

    def watch(
        self, sources: Mapping[str, tuple[torch.Tensor, torch.dtype]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as the loader gets them, one at a time."""
        for name, (source, wire) in sources.items():
            self._ours = True
            self._shown, self._source = source.to(wire), source
            self._ours = False
            yield name, self._shown
        self._shown = self._source = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Does the operation, and judges it."""
        result = func(*args, **(kwargs or {}))
        if not self._ours and not self.refused:
            self._judge(func, args)
        return result

    def _judge(self, func: Any, args: tuple[Any, ...]) -> None:
        if func is torch.ops.aten.copy_.default and self._into_model(args[0]):
            source = self._as_source(args[1])
            if source is None:
                self.refused = "its loader copies what it made itself"
            else:
                self.copies.append((args[0].detach(), source))
        elif func is torch.ops.aten.fill_.Scalar and self._into_model(args[0]):
            return  # padding: the same each time, and nothing writes it in between
        elif not _only_looks(func):
            self.refused = f"its loader does {func}"

    def _into_model(self, target: torch.Tensor) -> bool:
        return target.untyped_storage().data_ptr() in self._owned

    def _as_source(self, seen: torch.Tensor) -> torch.Tensor | None:
        """The part of the trainer's tensor that stands where a view of the shown one does."""
        shown, source = self._shown, self._source
        if shown is None or source is None or seen.dtype != shown.dtype:
            return None
        if seen.untyped_storage().data_ptr() != shown.untyped_storage().data_ptr():
            return None
        at = seen.storage_offset() - shown.storage_offset() + source.storage_offset()
        return source.as_strided(seen.shape, seen.stride(), at)


def _only_looks(func: Any) -> bool:
    """An operation that makes a view, or nothing."""
    schema = func._schema
    return func.is_view or (
        not schema.is_mutable
        and all(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        and bool(schema.returns)
    )


def _sort(plan: Plan, copies: Copies) -> None:
    """Puts neighbours together, then what one kernel can take, and the small ones into groups."""
    groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    plan.table, others = copy_table.make(list(_joined(copies)))
    for target, source in others:
        if target.nbytes >= LARGE_BYTES or not (target.is_contiguous() and source.is_contiguous()):
            plan.large.append((target, source))
        elif target.numel():
            targets, sources = groups.setdefault((target.dtype, source.dtype), ([], []))
            targets.append(target)
            sources.append(source)
    plan.small.extend(groups.values())


def _joined(
    copies: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Copies in order, those that go on where the one before ended made one with it."""
    last: tuple[torch.Tensor, torch.Tensor] | None = None
    for target, source in copies:
        pair = (target, source.expand_as(target))
        if all(x.is_contiguous() for x in pair):
            pair = (target.reshape(-1), pair[1].reshape(-1))
            if last is not None and all(_goes_on(a, b) for a, b in zip(last, pair, strict=True)):
                size = (last[0].numel() + target.numel(),)
                last = (last[0].as_strided(size, (1,)), last[1].as_strided(size, (1,)))
                continue
        if last is not None:
            yield last
        last = pair
    if last is not None:
        yield last


def _goes_on(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.dim() == 1
        and first.is_contiguous()
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _disproof(model: nn.Module, plan: Plan, targets: Sequence[torch.Tensor]) -> str:
    """Why a plan does not do what the loader did; empty: it does. The weights are right afterwards."""
    written = _written(model, targets)
    expected = _sum(written)
    for target in targets:
        _spoil(target)
    spoilt = _sum(written)
    plan.run(model)
    if _sum(written) == expected and (spoilt != expected or not plan.num_copies):
        return ""
    load_weights(model, plan.sources)
    return "its copies done again give other weights"


def _written(model: nn.Module, targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The weights that copies go to, whole: what else a model has they cannot change."""
    storages = {target.untyped_storage().data_ptr() for target in targets}
    return [x for x in _all(model) if x.untyped_storage().data_ptr() in storages]


def _spoil(target: torch.Tensor) -> None:
    target.fill_(float("nan") if target.is_floating_point() else 85)


def checksum(model: nn.Module) -> str:
    """A number for all weights of a model: each element counts with its place (sums modulo 2^64)."""
    return _sum(_all(model))


def _all(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _sum(tensors: Sequence[torch.Tensor]) -> str:
    total = 0
    for index, tensor in enumerate(tensors):
        total = (total * 1_000_003 + index + _digest(tensor)) % (1 << 64)
    return f"{total:016x}"


def _digest(tensor: torch.Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    wide = torch.int64 if raw.numel() % 8 == 0 and raw.data_ptr() % 8 == 0 else torch.uint8
    sums: list[torch.Tensor] = []
    for start, part in enumerate(raw.view(wide).split(_CHUNK)):
        places = torch.arange(part.numel(), device=part.device).mul_(2).add_(1 + 2 * _CHUNK * start)
        sums.append(places.mul_(part).sum())
    return int(torch.stack(sums).sum()) % (1 << 64) if sums else 0


# ---------------------------------------------------------------------------------------------- reporting


def _state_of(model: nn.Module) -> _State:
    if model not in _states:
        _states[model] = state = _State()
        _give_reader(model, state)
    return _states[model]


def _give_reader(model: nn.Module, state: _State) -> None:
    """Lets SGLang's /get_weights_by_name read reports of this model beside what it could read before."""
    theirs: Any = getattr(model, "get_weights_by_name", None)

    def read(name: str, truncate_size: int = 100, **more: Any) -> Any:
        if name.startswith(SIGNAL):
            _load(model, name.removeprefix(SIGNAL), (), signalled=True)
        if name == REPORT or name.startswith(SIGNAL):
            return _as_numbers({**state.report, "takes_signals": _takes_signals(state)})
        if name == CHECKSUM:
            return _as_numbers({"checksum": checksum(model)})
        if theirs is None:
            raise LookupError(f"{name!r}: this model's weights cannot be read by name")
        return theirs(name, truncate_size, **more)

    model.__dict__["get_weights_by_name"] = read


def _as_numbers(said: Mapping[str, Any]) -> list[float]:
    return [float(byte) for byte in json.dumps(said).encode()]


def _takes_signals(state: _State) -> bool:
    """The order that was done last can be repeated by reading a name, which reaches one model of one rank."""
    alone = len(_states) == 1 and _num_ranks() == 1
    return alone and state.plan is not None and not state.plan.refused


def _num_ranks() -> int:
    groups = torch.distributed
    return groups.get_world_size() if groups.is_available() and groups.is_initialized() else 1


def _of_all_ranks(model: nn.Module, report: dict[str, Any]) -> dict[str, Any]:
    """A report that is good only where every rank's is."""
    groups = torch.distributed
    if _num_ranks() < 2:
        return report
    try:
        good = torch.tensor(int(report["ok"]), device=_device(model), dtype=torch.int32)
        groups.all_reduce(good, op=groups.ReduceOp.MIN)
        everybody = bool(good.item())
    except Exception as error:
        return report | {"ok": False, "message": f"ranks could not agree: {error}"[:500]}
    if report["ok"] and not everybody:
        return report | {"ok": False, "message": "another rank failed: its log says how"}
    return report


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _synchronize(model: nn.Module) -> None:
    if _device(model).type == "cuda":
        torch.cuda.synchronize()
