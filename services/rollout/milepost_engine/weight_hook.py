"""Weights into SGLang's model, in its own process: what `--custom-weight-loader` names and engines call.

    update_weights_from_tensor(load_format="milepost_engine.weight_hook.load")
        [(order, -), (segment, handle), ...] ──> load(model, ...) ──> report, read at /get_weights_by_name

An order names a layout: where the trainer's tensors lie in segments of its memory. The first order of a
layout brings the handles and is done by the model's own `load_weights`, while every copy that this makes is
recorded: fused projections, tensor-parallel shards and padding come out right because nobody here knows of
them. If all it did was to copy out of the trainer's tensors, the recording is a plan. It is proven once (what
it writes is spoilt, then written by the plan, and must hash as before) and from then on an order is a line of
text: the handles stay open and a few copies are all there is to do (`copy_plan`). A model whose loader does
more than copy is loaded by it each time. What is open must be the trainer's memory and no copy of it: each
order has another stamp, which is read there first.

Such an order may also come as a signal, a read of the name `milepost.signal:<order>`, which SGLang does
between two steps of a running engine. So a signal is done, or refused before its first byte is written, or
ends the process (`_whole_or_never`), and SGLang with it.

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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from milepost_engine.copy_plan import Plan, checksum, make_plan

log = logging.getLogger(__name__)

REPORT, CHECKSUM, SIGNAL = "milepost.report", "milepost.checksum", "milepost.signal:"
STAMP = "stamp"


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
        report = {"ok": True, "message": "", "planned": planned, "signalled": signalled}
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
