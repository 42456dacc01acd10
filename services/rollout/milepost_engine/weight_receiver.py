"""Weights that a trainer broadcasts, received in SGLang's own process: the pushed orders of `weight_hook`.

    own stream   bucket k+1 ──> staging ring ......        the group that SGLang joined by the router's order
    model's          bucket k: staging ──plan──> weights

The first order of a layout names what lies where in each bucket; each is loaded by the model's own loader,
and recorded (see `copy_plan.make_plan`). From the second one on an order starts all broadcasts and all
copies at once, and waits for the last of them.

An order has one deadline, `timeout_s`, whoever else is there to see to it:

    what is under way                  at the deadline
    bytes on their way                 the communicator is aborted and the report says so; the weights are
                                       nobody's
    the group forms, at its first      nothing gets a thread out of these: `GRACE_S` later the process ends,
    broadcast; a loader is recorded    with the stacks of its threads on stderr

SGLang ends with any of its processes, so its launcher starts it again, or whoever runs it.

State is of the process: for each model the staging ring (`depth` buckets) and the plans into it. Torch and
the standard library alone are imported here.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d

from milepost_engine.copy_plan import Plan, make_plan
from milepost_engine.weight_hook import Place, source

GRACE_S = 10.0
"""How much later than the deadline of its order a process ends that is stuck in a call."""
_LOOK_S = 0.0002
_STDERR = 2


@dataclass
class Reception:
    """What this process knows of one layout.

    Attributes:
      layout: its name.
      sizes: bytes of each bucket.
      ring: staging memory; bucket k lands in the k-th, modulo its length.
      plans: one a bucket.
    """

    layout: str
    sizes: tuple[int, ...]
    ring: tuple[torch.Tensor, ...]
    plans: list[Plan] = field(default_factory=list[Plan])

    def staged(self, index: int) -> torch.Tensor:
        """Where a bucket lands."""
        return self.ring[index % len(self.ring)][: self.sizes[index]]


_receptions: WeakKeyDictionary[nn.Module, Reception] = WeakKeyDictionary()
_given_up: list[Any] = []
"""Groups whose members are gone, with what was on its way: to let go of one may wait for it."""


@dataclass(frozen=True)
class _Deadline:
    """Of one order.

    Attributes:
      timeout_s: from its beginning.
      at: on the monotonic clock.
    """

    timeout_s: float
    at: float

    @classmethod
    @contextmanager
    def of(cls, timeout_s: float) -> Generator[_Deadline]:
        """The deadline of the block; a thread that knows no Python ends the process where that is stuck."""
        faulthandler.dump_traceback_later(timeout_s + GRACE_S, exit=True, file=_STDERR)
        try:
            yield cls(timeout_s, time.monotonic() + timeout_s)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def give_up(self, group: Any, *under_way: Any) -> None:
        """Aborts a group when it is time.

        Raises:
          TimeoutError: it was.
        """
        if time.monotonic() < self.at:
            return
        _given_up.append((group, under_way))
        group.abort()
        raise TimeoutError(f"not all weights came within {self.timeout_s:g} s: a member of the group is gone")


def receive(model: nn.Module, layout: str, said: Mapping[str, Any]) -> bool:
    """Receives all buckets of an order into a model; returns whether by plans alone.

    Args:
      model: SGLang's.
      layout: name of the buckets.
      said: `group`, `timeout_s`, and, where the layout may be unknown, `depth` and `buckets`: of each its
        size and the (name, shape, dtype, offset) of its tensors.

    Raises:
      LookupError: the layout or the group is not known here.
      TimeoutError: not all of it came in time; the group is aborted.
    """
    group = _group(said["group"])
    with _Deadline.of(float(said["timeout_s"])) as deadline:
        if "buckets" in said:
            _receptions.pop(model, None)  # its staging memory first
            _receptions[model] = _learn(model, layout, said, group, deadline)
            return False
        return _again(model, layout, group, deadline)


def _again(model: nn.Module, layout: str, group: Any, deadline: _Deadline) -> bool:
    """Receives a layout that is known; returns whether by plans alone."""
    known = _receptions.get(model)
    if known is None or known.layout != layout:
        held = known.layout if known else "none"
        raise LookupError(f"layout {layout} is not known here ({held} is); send its tensors again")
    if known.ring[0].device.type == "cuda":
        _overlapped(model, known, group, deadline)
    else:
        for index, plan in enumerate(known.plans):
            _take(known.staged(index), group, deadline)
            plan.run(model)
    return not any(plan.refused for plan in known.plans)


def _take(staged: torch.Tensor, group: Any, deadline: _Deadline) -> None:
    """Receives one bucket; a copy enqueued afterwards finds it there."""
    work: Any = dist.broadcast(staged, src=0, group=group, async_op=True)  # the first one forms the group
    while not work.is_completed():
        deadline.give_up(group, work, staged)
        time.sleep(_LOOK_S)
    work.wait()


def _learn(
    model: nn.Module, layout: str, said: Mapping[str, Any], group: Any, deadline: _Deadline
) -> Reception:
    """Loads each bucket by the model's own loader, and records what that does."""
    buckets: Sequence[tuple[int, Sequence[Sequence[Any]]]] = said["buckets"]
    device = next(model.parameters()).device
    largest, depth = max(size for size, _ in buckets), min(int(said["depth"]), len(buckets))
    ring = tuple(torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(depth))
    reception = Reception(layout, tuple(size for size, _ in buckets), ring)
    for index, (_, tensors) in enumerate(buckets):
        staged = reception.staged(index)
        _take(staged, group, deadline)
        places = [
            Place(name, tuple(shape), dtype, dtype, "", offset) for name, shape, dtype, offset in tensors
        ]
        sources = {place.name: source(place, {"": staged}) for place in places}
        reception.plans.append(make_plan(model, f"{layout}/{index}", sources))
    return reception


def _overlapped(model: nn.Module, known: Reception, group: Any, deadline: _Deadline) -> None:
    """Enqueues everything, then waits for the end of it."""
    main, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(main)
    written: list[Any] = []
    for index, plan in enumerate(known.plans):
        if index >= len(known.ring):
            own.wait_event(written[index - len(known.ring)])
        with torch.cuda.stream(own):
            dist.broadcast(known.staged(index), src=0, group=group)
            arrived = own.record_event()
        main.wait_event(arrived)
        plan.run(model)
        written.append(main.record_event())
    while not written[-1].query():
        deadline.give_up(group)
        time.sleep(_LOOK_S)


def _group(name: str) -> Any:
    """The process group of that name; torch has no public way to ask for it."""
    world: Any = c10d._world  # pyright: ignore[reportPrivateUsage]
    for group, its in world.pg_names.items():
        if str(its) == name:
            return group
    raise LookupError(f"group {name!r} is not known here: it was not joined, or left")
