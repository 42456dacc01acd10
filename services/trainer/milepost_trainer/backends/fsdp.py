"""The FSDP2 backend: parameters sharded over a one-dimensional mesh, on any device torch knows.

    micro-batch --Policy (gathered layer by layer)--> token loss * weights --backward--> sharded gradients
    step: clip to the global norm -> AdamW at the scheduled rate -> clear

Loss convention: weights already carry 1 / (tokens of all ranks), and FSDP averages gradients over ranks, so
the local loss is multiplied by the number of ranks. One rank without mixed precision is not wrapped at all:
same numbers, no hooks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from milepost_trainer import buckets as bucket_plan
from milepost_trainer.backends.base import Backend, MicroBatchResult, StepResult
from milepost_trainer.backends.faults import Faults
from milepost_trainer.backends.gathering import Gathering
from milepost_trainer.backends.gradients import scale_gradients, squared_norm
from milepost_trainer.backends.offload import Shelf
from milepost_trainer.backends.random_state import RandomState
from milepost_trainer.backends.recovery import Recovery, free_unused
from milepost_trainer.batch import MicroBatch
from milepost_trainer.buckets import Bucket
from milepost_trainer.export import write_hf_export
from milepost_trainer.head import RowScores, TokenScores
from milepost_trainer.layers import prepare_layers
from milepost_trainer.objectives.base import Objective
from milepost_trainer.policy import Policy, load_policy
from milepost_trainer.schedule import learning_rate
from milepost_trainer.settings import TrainerSettings
from milepost_trainer.world import World

_PREFIX = "lm."
T = TypeVar("T")


class FsdpBackend(Backend):
    """A causal LM sharded by ``fully_shard``, trained by AdamW."""

    def __init__(self, settings: TrainerSettings, world: World, *, with_reference: bool = False) -> None:
        """Load, shard and make ready to train.

        Args:
            settings: the trainer's.
            world: the ranks, all of which build at once.
            with_reference: also load the frozen reference model.
        """
        self.world = world
        self.num_updates = 0
        self._settings = settings
        self._policy = self._load(settings.model_dir, settings.initial_weights).train()
        self.vocab_size = int(cast(Any, self._policy.lm).config.get_text_config().vocab_size)
        self._reference = self._load_reference() if with_reference else None
        self._named = _publishable(self._policy)
        by_handle = settings.publish.transport == "cuda_ipc"
        self._gathering = Gathering(self._named, world, resident=by_handle)
        adam = settings.optimizer
        self._parameters = [p for p in self._policy.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=adam.lr,
            betas=adam.betas,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            fused=True,
        )
        for parameter in self._parameters:
            self._optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=world.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._weights = Shelf(self._all_weights, enabled=settings.offload == "all")
        self._moments = Shelf(self._all_moments, enabled=settings.offload != "none")
        self._moments.put_away()
        self._recovery = Recovery(world, [m for m in (self._policy, self._reference) if m is not None])
        self._random = RandomState(world.device)
        self._faults = Faults(settings.debug, rank=world.rank)
        self._faults.install(self._policy, self._optimizer)

    # ------------------------------------------------------------------ training

    def forward_logprobs(self, batch: MicroBatch, *, reference: bool = False) -> torch.Tensor:
        """See ``Backend.forward_logprobs``."""
        model = self._reference if reference else self._policy
        if model is None:
            raise RuntimeError("no reference model was loaded: build the backend with with_reference=True")
        with torch.no_grad():
            return model(batch).logprobs.float()

    def train_micro_batch(self, batch: MicroBatch, objective: Objective, *, last: bool) -> MicroBatchResult:
        """See ``Backend.train_micro_batch``."""
        if self.world.mesh is None and not batch.has_loss:
            return MicroBatchResult(num_tokens=0)
        if isinstance(self._policy, FSDPModule):
            self._accumulate(self._policy, last=last)
        scores = self._policy(
            batch,
            with_entropy=self._settings.objective.entropy,
            slope=partial(self._slope, objective, batch),
        )
        result = objective.token_loss(batch, scores)
        loss = (result.loss * batch.weights).sum()
        (loss * self.world.size).backward()
        reports = dict(result.reports)
        if scores.entropy is not None:
            reports["entropy_loss"] = scores.entropy.detach()
        summary = _summarise(loss.detach(), batch, reports)
        if last:
            _ = summary.loss  # waits for the device: the passes' time is theirs, and not the optimizer's
        return summary

    def _slope(self, objective: Objective, batch: MicroBatch, cut: slice, rows: RowScores) -> torch.Tensor:
        """Gradient of a chunk's part of the loss with respect to its log-probs: objectives judge each token
        by itself, so a part is enough."""
        part = batch.predicted(cut)
        with torch.enable_grad():
            logprobs = rows.logprobs.detach().requires_grad_()
            losses = objective.token_loss(part, TokenScores(logprobs, rows.entropy)).loss
            loss = (losses * part.weights).sum() * self.world.size
        return torch.autograd.grad(loss, logprobs)[0]

    def _accumulate(self, policy: FSDPModule, *, last: bool) -> None:
        """Until the last micro-batch, gradients may stay whole on each rank: nothing to reduce, no weights to
        gather again where they are kept. One rank alone loses no memory by that."""
        fsdp = self._settings.fsdp
        reduces = last or (fsdp.reduce_every_micro_batch and self.world.size > 1)
        policy.set_requires_gradient_sync(reduces)
        policy.set_reshard_after_backward(last or fsdp.reshard_after_forward)

    def attempt(self, work: Callable[[MicroBatch], T], batch: MicroBatch) -> T | None:
        """See ``Backend.attempt``."""
        self._random.mark()
        self._wake()
        return self._recovery.attempt(work, batch)

    def discard(self) -> None:
        """See ``Backend.discard``."""
        self._optimizer.zero_grad(set_to_none=True)
        self._recovery.discard()
        self._random.restore()

    def rest(self) -> None:
        """See ``Backend.rest``."""
        self._recovery.updated()  # modules that are still whole are resharded
        self._weights.put_away()
        if self._weights.is_away:
            free_unused(self.world.device)

    @property
    def offload_s(self) -> float:
        """See ``Backend.offload_s``."""
        return self._weights.seconds + self._moments.seconds

    def _wake(self) -> None:
        self._bring(self._weights, what="the weights")

    def _bring(self, shelf: Shelf, *, what: str) -> None:
        def fetch() -> float:
            shelf.fetch()
            return 0.0

        if shelf.is_away:  # on all ranks alike
            self._recovery.together(fetch, what=f"{what}, back from the host")

    def _all_weights(self) -> list[torch.Tensor]:
        models = (self._policy, self._reference)
        return [p.detach() for model in models if model is not None for p in model.parameters()]

    def _all_moments(self) -> list[torch.Tensor]:
        kinds = ("exp_avg", "exp_avg_sq")
        return [state[kind] for state in self._optimizer.state.values() for kind in kinds]

    @contextmanager
    def _complete(self) -> Generator[None]:
        """Weights and optimizer state are on the device for a while."""
        self._wake()
        self._bring(self._moments, what="the optimizer state")
        try:
            yield
        finally:
            self._moments.put_away()

    def step(self) -> StepResult:
        """See ``Backend.step``."""
        rate = self._rate()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        squared, tries = self._recovery.together(self._prepare_step, what="the optimizer")
        retries = tries if self.world.leads else 0
        norm = math.sqrt(squared)
        skipped = not math.isfinite(norm)
        if not skipped:
            scale_gradients(self._parameters, self._settings.optimizer.max_grad_norm / (norm + 1e-6))
            retries += self._recovery.move(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        self._moments.put_away()
        self._random.forget()
        self._recovery.updated()
        self.num_updates += 1
        return StepResult(grad_norm=norm, learning_rate=rate, skipped=skipped, retries=retries)

    def _prepare_step(self) -> float:
        """All that may run out of memory, before anything changes."""
        self._faults.clipping()
        self._moments.fetch()
        return squared_norm(self._parameters)

    def _rate(self) -> float:
        schedule = self._settings.schedule
        return learning_rate(
            self.num_updates,
            peak=self._settings.optimizer.lr,
            kind=schedule.kind,
            warmup_updates=schedule.warmup_updates,
            total_updates=schedule.total_updates,
            final_fraction=schedule.final_fraction,
        )

    # ------------------------------------------------------------------ reading out

    def plan_buckets(self, *, bucket_bytes: int, wire_dtype: str | None) -> tuple[Bucket, ...]:
        """See ``Backend.plan_buckets``."""
        tensors = [
            (name, _wire(tensor.dtype, wire_dtype), tuple(tensor.shape))
            for name, tensor in self._named.items()
        ]
        return bucket_plan.plan_buckets(tensors, bucket_bytes=bucket_bytes)

    def gather_bucket(self, bucket: Bucket) -> torch.Tensor | None:
        """See ``Backend.gather_bucket``."""
        self._wake()
        return self._gathering.bucket(bucket)

    def whole_weights(self, buckets: Sequence[Bucket]) -> Mapping[str, torch.Tensor]:
        """See ``Backend.whole_weights``."""
        self._wake()
        return self._gathering.whole(buckets)

    def export_hf(self, directory: Path) -> None:
        """See ``Backend.export_hf``."""
        self._wake()
        whole: dict[str, torch.Tensor] = {}
        for name, tensor in self._named.items():
            gathered = _full(tensor.detach())
            if self.world.leads:
                whole[name] = gathered.cpu().clone()
        if self.world.leads:
            write_hf_export(
                directory, model=self._policy.lm, tensors=whole, source=Path(self._settings.model_dir)
            )
        self.world.barrier()

    # ------------------------------------------------------------------ checkpoints

    def save(self, directory: Path) -> None:
        """See ``Backend.save``."""
        with _quiet(), self._complete():
            state_dict_saver.save(self._state(), checkpoint_id=directory, no_dist=self.world.mesh is None)

    def load(self, directory: Path) -> None:
        """See ``Backend.load``."""
        with _quiet(), self._complete():
            state = self._state()
            state_dict_loader.load(state, checkpoint_id=directory, no_dist=self.world.mesh is None)
        for parameter in self._parameters:
            self._optimizer.state[parameter]["step"].copy_(state["counters"]["adam_steps"])
        self.num_updates = int(state["counters"]["num_updates"])
        torch.set_rng_state(state["random"])

    def _state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds; loading writes into these very tensors."""
        adam = self._optimizer.state
        moments = {
            name: {kind: adam[tensor][kind] for kind in ("exp_avg", "exp_avg_sq")}
            for name, tensor in self._named.items()
            if tensor in adam
        }
        return {
            "model": {name: tensor.detach() for name, tensor in self._named.items()},
            "optimizer": moments,
            "counters": {
                "num_updates": torch.tensor(self.num_updates),
                "adam_steps": adam[self._parameters[0]]["step"].cpu().clone(),
            },
            "random": torch.get_rng_state(),
        }

    # ------------------------------------------------------------------ building

    def _load(self, model_dir: str, initial_weights: str) -> Policy:
        settings = self._settings
        policy = load_policy(
            Path(model_dir),
            dtype=bucket_plan.DTYPES[settings.dtype],
            initial_weights=initial_weights,
            seed=settings.seed,
            head_chunk_tokens=settings.head_chunk_tokens,
            device=self.world.device,
        ).to(self.world.device)
        prepare_layers(
            policy.layers,
            checkpointing=settings.fsdp.activation_checkpointing,
            every=settings.fsdp.checkpoint_every,
            compiled=_compiles(settings, self.world.device),
        )
        if self.world.mesh is not None:
            _shard(policy, settings, self.world)
        return policy

    def _load_reference(self) -> Policy:
        named = self._settings.reference_dir
        weights = "load" if named else self._settings.initial_weights
        return self._load(named or self._settings.model_dir, weights).eval().requires_grad_(False)


@contextmanager
def _quiet() -> Generator[None]:
    """torch warns that one process saves alone, which is what was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _compiles(settings: TrainerSettings, device: torch.device) -> bool:
    half = (settings.compute_dtype or settings.dtype) == "bfloat16"
    return settings.compile == "always" or (settings.compile == "auto" and half and device.type == "cuda")


def _shard(policy: Policy, settings: TrainerSettings, world: World) -> None:
    compute = settings.compute_dtype or settings.dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute == settings.dtype else bucket_plan.DTYPES[compute],
        reduce_dtype=None if compute == settings.dtype else bucket_plan.DTYPES[settings.dtype],
    )
    reshard = settings.fsdp.reshard_after_forward
    for layer in policy.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(policy, mesh=world.mesh, mp_policy=precision, reshard_after_forward=False)


def _publishable(policy: Policy) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by Hugging Face name, tied ones once."""
    state = policy.state_dict(keep_vars=True)
    named: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name.removeprefix(_PREFIX)] = tensor
    return named


def _wire(dtype: torch.dtype, wire_dtype: str | None) -> str:
    return wire_dtype if wire_dtype and dtype.is_floating_point else bucket_plan.dtype_name(dtype)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a maybe sharded tensor, on every rank (collective)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _summarise(
    loss: torch.Tensor, batch: MicroBatch, reports: Mapping[str, torch.Tensor]
) -> MicroBatchResult:
    """Add up what is reported, on the device; the dummy of an idle rank counts as nothing."""
    names = tuple(reports)
    if not batch.has_loss:
        return MicroBatchResult(num_tokens=0, names=names)
    values = torch.stack([loss.double(), *(value.double().sum() for value in reports.values())])
    return MicroBatchResult(num_tokens=batch.num_predicted, names=names, values=values)
