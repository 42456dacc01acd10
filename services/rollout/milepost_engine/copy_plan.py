"""A model's own loading of weights, recorded, and done again as copies: what `weight_hook` stands on.

    make_plan ── load_weights under a recorder ──> copies ── sorted ──> Plan ── spoil, run, compare ──> proven
                            └ anything but copies ─────────────────────> Plan.refused: loaded by it each time

A plan belongs to whoever asked for it; it holds the trainer's tensors and views of the model's weights. Torch
and the standard library alone are imported here, by `copy_table` too, and Triton where it works.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from milepost_engine import copy_table
from milepost_engine.copy_table import Copies

log = logging.getLogger(__name__)

LARGE_BYTES = 16 << 20
"""From here on a tensor is copied by itself, where the kernel does not take it; smaller ones go together."""
_CHUNK = 1 << 24

_copy_many: Any = getattr(torch, "_foreach_copy_")  # noqa: B009  (one kernel for many tensors; torch has no other)


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
