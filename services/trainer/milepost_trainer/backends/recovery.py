"""Out of memory on one rank: nobody is left waiting, and nothing is learnt from the failed try.

A pass of a sharded model (forward, or forward and backward) is a fixed row of collectives. A rank that leaves
the row in its middle leaves the others in a collective that nobody completes. So it first pays what it owes:

    the rank that ran out                              the others
    TRYING --out of memory, anywhere in the pass-->    TRYING, in the next collective of the pass
    UNWOUND: activations are freed, FSDP is reset          .
    PAYING: the pass again, with two tokens;               go on, with true weights
            collectives already made are left out,         and worthless gradients
            the others are made
    AGREEING: one sum over the control group          AGREEING
       nobody failed: the pass counts
       somebody failed: DISCARDING, on every rank: gradients since the last update, random state;
                        the learner plans smaller and begins the update again

The row depends on the modules and on which of them are whole when it begins, not on the tokens. Modules may
stay whole from one pass to the next, so the row of an update is counted from its first pass, which begins
with all modules sharded; what is paid is the rest of that row up to the end of the pass that failed. A
collective that itself raises may or may not have been made: that, and running out of memory with two tokens,
ends the process, and the launcher ends the other ranks. The others wait for a paying rank no longer than a
collective may take.

What moves the parameters has no collectives but one, so it is tried on every rank, agreed upon, and tried
once more (`together`). `Recovery` owns the counts; the gradients stay the backend's.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

from milepost.errors import ResourceExhausted
from milepost_trainer.batch import MicroBatch, dummy_batch
from milepost_trainer.world import World

log = logging.getLogger(__name__)

T = TypeVar("T")
_UNDER_WAY = (
    "_all_gather_result",
    "_post_reduce_event",
    "_all_reduce_state",
    "_reshard_after_forward_event",
    "_partial_reduce_output",
)
_SIGNS = ("out of memory", "alloc_failed", "can't allocate memory")


class DoesNotFit(ResourceExhausted):
    """Memory is short however small the plan; the message says of what, and what would help."""


class BrokenCollective(Exception):
    """A collective raised: whether the other ranks have seen it is unknown, so this rank cannot go on."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


class Dues:
    """Counts the collectives of a row; in a row that is made again, leaves out the first of them.

    Attributes:
        made: collectives of this row so far, those that were left out included.
    """

    def __init__(self) -> None:
        self.made = 0
        self._left_out = 0

    def begin(self, *, leave_out: int = 0) -> None:
        """Begin a row whose first `leave_out` collectives were made before."""
        self.made, self._left_out = 0, leave_out

    def pay(self, make: Callable[[], Any], output: torch.Tensor) -> Any:
        """Make a collective, unless it was made before; the output is then zeros."""
        if self.made < self._left_out:
            self.made += 1
            output.zero_()
            return None
        try:
            work = make()
        except Exception as error:
            raise BrokenCollective(f"collective {self.made + 1} of an update failed: {error}") from error
        self.made += 1
        return work


class _AllGather(DefaultAllGather):
    def __init__(self, dues: Dues) -> None:
        self._dues = dues

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> dist.Work | None:
        make = super().__call__
        return self._dues.pay(lambda: make(output_tensor, input_tensor, group, async_op), output_tensor)


class _ReduceScatter(DefaultReduceScatter):
    def __init__(self, dues: Dues) -> None:
        self._dues = dues

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        make = super().__call__
        return self._dues.pay(lambda: make(output_tensor, input_tensor, group, op, async_op), output_tensor)


class Recovery:
    """Makes passes of sharded models survive a rank that runs out of memory.

    Args:
        world: the ranks.
        models: every model that passes go through; those that are not sharded need no care.
    """

    def __init__(self, world: World, models: Sequence[nn.Module]) -> None:
        self._world = world
        self._dues = Dues()
        self._row: list[Callable[[MicroBatch], Any]] = []  # passes since the last update or discard
        self._roots = [model for model in models if isinstance(model, FSDPModule)]
        for part in self._parts():
            part.set_custom_all_gather(_AllGather(self._dues))
            part.set_custom_reduce_scatter(_ReduceScatter(self._dues))

    def attempt(self, work: Callable[[MicroBatch], T], batch: MicroBatch) -> T | None:
        """One pass; None where this rank ran out of memory. The ranks have yet to agree on what became of it.

        Args:
            work: the pass: makes the same collectives for every batch.
            batch: this rank's.

        Raises:
            DoesNotFit: not even two tokens go through.
        """
        if not self._row:
            for part in self._parts():
                part.reshard()
            self._dues.begin()
        self._row.append(work)
        try:
            return work(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("rank %d: a micro-batch of %d tokens: %s", self._world.rank, batch.num_fed, error)
        # Out here the error is gone, and with its frames the activations that they held.
        self._unwind()
        if self._world.size > 1:
            self._pay()
        return None

    def _pay(self) -> None:
        made = self._dues.made
        self._dues.begin(leave_out=made)
        try:
            for work in self._row:
                work(dummy_batch(self._world.device))
        except Exception as error:
            if is_out_of_memory(error):
                raise DoesNotFit(
                    f"rank {self._world.rank} has no memory for two tokens: {error}; give the trainer more "
                    "of it: trainer.offload, more ranks (nproc), a smaller engine on this device"
                ) from error
            raise
        if self._dues.made < made:
            raise BrokenCollective(
                f"an update made {made} collectives, and {self._dues.made} when made again"
            )

    def together(self, work: Callable[[], float], *, what: str) -> tuple[float, int]:
        """Local work on every rank, then the sum of what it returns; all try once more if one ran out.

        Args:
            work: may be begun twice; makes no collective.
            what: it is, for the message.

        Returns:
            The sum, and how often somebody ran out of memory.

        Raises:
            DoesNotFit: on every rank, where some rank ran out twice.
        """
        failed = 0.0
        for tries in range(2):
            value = self._locally(work, what=what)
            failed, total = self._world.sum([float(value is None), value or 0.0])
            if not failed:
                return total, tries
        raise DoesNotFit(
            f"{what}: {failed:.0f} of {self._world.size} ranks have no memory for it, twice; "
            "set trainer.offload, use more ranks (nproc), or a smaller engine on this device"
        )

    def _locally(self, work: Callable[[], float], *, what: str) -> float | None:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("rank %d: %s: %s", self._world.rank, what, error)
        free_unused(self._world.device)
        return None

    def move(self, optimizer: torch.optim.Optimizer) -> int:
        """Have the optimizer move this rank's parameters; once more, if it ran out before it had begun.

        Returns:
            How often it was begun again on this rank.
        """
        before = {parameter: state["step"].clone() for parameter, state in optimizer.state.items()}
        try:
            optimizer.step()
            return 0
        except Exception as error:
            if not is_out_of_memory(error) or not _as_before(optimizer, before):
                raise
            log.warning("rank %d: the optimizer: %s", self._world.rank, error)
        free_unused(self._world.device)
        optimizer.step()
        return 1

    def discard(self) -> None:
        """Forget the passes since the last update, and gradients that no collective has reduced yet."""
        self._unwind()
        self._row.clear()

    def updated(self) -> None:
        """The passes so far have become an update, or nobody wants them: the next begins a row of its own."""
        self._row.clear()
        for part in self._parts():
            part.reshard()

    def _unwind(self) -> None:
        for root in self._roots:
            _reset(root)
        free_unused(self._world.device)

    def _parts(self) -> list[FSDPModule]:
        modules = (module for root in self._roots for module in root.modules())
        return [module for module in modules if isinstance(module, FSDPModule)]


def free_unused(device: torch.device) -> None:
    """Give back what nobody holds: cycles of Python, then the allocator's cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _as_before(optimizer: torch.optim.Optimizer, steps: Mapping[Any, torch.Tensor]) -> bool:
    return all(torch.equal(optimizer.state[parameter]["step"], step) for parameter, step in steps.items())


def _reset(root: FSDPModule) -> None:
    """Forget a pass that was left in its middle.

    torch 2.13 brings `reset_iter_state`; a root that never ran and gradients that are not reduced yet are
    left to us. Older versions have the same state and no call that forgets it.
    """
    root_state: Any = root._get_fsdp_state()  # pyright: ignore[reportPrivateUsage]
    if root_state._is_root is None:
        return
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
    else:
        _reset_by_hand(root_state)
    for state in root_state._state_ctx.all_states:
        for group in _groups(state):
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):
                    parameter._unsharded_param.grad = None


def _reset_by_hand(root_state: Any) -> None:
    """What `reset_iter_state` does, once nothing is under way on the device."""
    if root_state._device.type == "cuda":
        torch.cuda.synchronize(root_state._device)
    shared, comm = root_state._state_ctx, root_state._comm_ctx
    shared.iter_forward_root, shared.post_backward_final_callback_queued = None, False
    comm.all_gather_state = comm.reduce_scatter_state = None
    for name in ("post_forward_order", "reduce_scatter_states", "_last_post_reduce_events"):
        getattr(comm, name, []).clear()
    for state in shared.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        for group in _groups(state):
            for name in _UNDER_WAY:
                setattr(group, name, None)
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()


def _groups(state: Any) -> list[Any]:
    """A module's groups of parameters; before torch 2.12 it has one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group is not None else []
