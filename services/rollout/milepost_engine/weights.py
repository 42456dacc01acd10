"""The model's weights as named tensors: checking, writing, hashing, releasing.

    PRESENT --release--> RELEASED --resume--> EMPTY --every tensor written--> PRESENT

Checking is pure and comes before every write: an update either names only tensors the model has, in their
shapes and in a dtype that converts, or is refused whole. A tensor may be sent in the model's dtype, or in
another floating one, which is cast on the way in (bfloat16 from a trainer into a float32 engine). Tied
weights have several names for one storage; each name is accepted, and the last write stands.

All methods but `check` belong to the scheduler thread.

The checksum is one anybody can compute: SHA-256 of a tensor's contiguous little-endian bytes per name, and
for the whole, SHA-256 over the lines `name NUL dtype NUL shape NUL digest LF` in order of name, tied names
once (under the name the model lists first), dtype as "float32", shape as "64,64".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import nn

from milepost_engine.errors import InvalidRequest, UpdateRefused

WeightState = Literal["present", "released", "empty"]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def parse_dtype(name: object, *, where: str) -> torch.dtype:
    """Reads "float32" or "torch.float32".

    Raises:
        UpdateRefused: No such dtype.
    """
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else None
    if dtype is None:
        raise UpdateRefused(f"{where} is {name!r}: it must be one of {', '.join(DTYPES)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an update, before its bytes.

    Attributes:
        name: As the model's checkpoint names it.
        dtype: Of the bytes sent.
        shape: Full shape.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def size_bytes(self) -> int:
        """Bytes, without padding."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Checksums:
    """SHA-256 in hex of every tensor, and of the whole."""

    tensors: dict[str, str]
    overall: str


class WeightStore:
    """Named access to the parameters and saved buffers of one model.

    Args:
        model: The model, whose tied parameters are already tied.
    """

    def __init__(self, model: nn.Module) -> None:
        saved = set(model.state_dict().keys())
        found: list[tuple[str, torch.Tensor]] = list(model.named_parameters(remove_duplicate=False))
        found += [pair for pair in model.named_buffers(remove_duplicate=False) if pair[0] in saved]
        self._tensors = dict(found)
        self._specs = {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in found}
        first: dict[int, str] = {}
        for name, tensor in found:
            first.setdefault(id(tensor), name)
        self._canonical = {name: first[id(tensor)] for name, tensor in found}
        self._names = sorted(first.values())
        self._unwritten: set[str] = set()
        self._snapshot: dict[str, torch.Tensor] | None = None
        self.state: WeightState = "present"

    @property
    def names(self) -> list[str]:
        """Every distinct tensor, tied ones once, in order of name."""
        return self._names

    @property
    def size_bytes(self) -> int:
        """Memory held now."""
        return sum(self._tensors[name].nbytes for name in self._names)

    def check(self, specs: Sequence[TensorSpec], *, complete: bool = False) -> None:
        """Refuses an update that would not fit, before any byte of it is read.

        Args:
            specs: What is to be written.
            complete: Every tensor of the model must be among them.

        Raises:
            UpdateRefused: Names the tensor, what was sent and what the model has.
        """
        if self.state == "released":
            raise UpdateRefused("the weights are released: call /resume_memory_occupation first")
        seen: set[str] = set()
        for sent in specs:
            self._check_one(sent)
            if sent.name in seen:
                raise UpdateRefused(f"tensor '{sent.name}' is sent twice: send each tensor once")
            seen.add(sent.name)
        missing = set(self._names) - {self._canonical[name] for name in seen} if complete else None
        if missing:
            raise UpdateRefused(
                f"{len(missing)} tensors of the model are missing, '{min(missing)}' among them: send all"
            )

    def _check_one(self, sent: TensorSpec) -> None:
        held = self._specs.get(sent.name)
        if held is None:
            near = get_close_matches(sent.name, self._names, n=1)
            hint = f"; nearest is '{near[0]}'" if near else ""
            raise UpdateRefused(f"tensor '{sent.name}' was sent but the model has none of that name{hint}")
        if sent.shape != held.shape:
            raise UpdateRefused(
                f"tensor '{sent.name}' was sent with shape {list(sent.shape)} but the model has "
                f"{list(held.shape)}: send it unsharded and in the model's shape"
            )
        castable = sent.dtype.is_floating_point and held.dtype.is_floating_point
        if sent.dtype != held.dtype and not castable:
            raise UpdateRefused(
                f"tensor '{sent.name}' was sent as {dtype_name(sent.dtype)} but the model has "
                f"{dtype_name(held.dtype)}: send that dtype, or another floating one for a floating tensor"
            )

    @torch.no_grad()
    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies checked tensors into the model."""
        for name, tensor in tensors:
            self._tensors[name].copy_(tensor)
            self._unwritten.discard(self._canonical[name])
        if self.state == "empty" and not self._unwritten:
            self.state = "present"

    def read(self, name: str, *, rows: int) -> list[Any]:
        """The first `rows` entries of a tensor along its first axis, as nested lists.

        Raises:
            InvalidRequest: There is no such tensor, or it is released.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            near = get_close_matches(name, self._names, n=1)
            raise InvalidRequest(f"name is '{name}', which the model does not have; nearest is {near}")
        self._require_memory()
        part = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()[:rows]
        return part.float().tolist() if tensor.dtype.is_floating_point else part.tolist()

    def checksum(self) -> Checksums:
        """Hashes every tensor."""
        self._require_memory()
        tensors = {name: _digest(self._tensors[name]) for name in self._names}
        overall = hashlib.sha256()
        for name in self._names:
            spec = self._specs[name]
            shape = ",".join(str(size) for size in spec.shape)
            overall.update(f"{name}\0{dtype_name(spec.dtype)}\0{shape}\0{tensors[name]}\n".encode())
        return Checksums(tensors, overall.hexdigest())

    def snapshot(self) -> None:
        """Keeps a copy of all weights for `differing`."""
        self._require_memory()
        self._snapshot = {name: self._tensors[name].detach().clone() for name in self._names}

    def differing(self) -> list[str]:
        """Names of the tensors that are not as they were at the snapshot.

        Raises:
            InvalidRequest: No snapshot was taken.
        """
        self._require_memory()
        if self._snapshot is None:
            raise InvalidRequest("action is 'compare' but no snapshot was taken: send 'snapshot' first")
        kept = self._snapshot
        return [name for name in self._names if not torch.equal(self._tensors[name], kept[name])]

    @torch.no_grad()
    def reset(self) -> None:
        """Overwrites every weight with noise, so that a following update proves itself."""
        self._require_memory()
        for name in self._names:
            tensor = self._tensors[name]
            if tensor.dtype.is_floating_point:
                tensor.normal_()
            else:
                tensor.zero_()

    @torch.no_grad()
    def release(self) -> None:
        """Gives the weights' memory back. Their values are gone."""
        for name in self._names:
            tensor = self._tensors[name]
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        self._snapshot = None
        self.state = "released"

    @torch.no_grad()
    def resume(self) -> None:
        """Allocates memory again; the model serves nothing until every tensor was written."""
        if self.state != "released":
            return
        for name in self._names:
            spec = self._specs[name]
            self._tensors[name].data = torch.zeros(spec.shape, dtype=spec.dtype)
        self._unwritten = set(self._names)
        self.state = "empty"

    @property
    def num_unwritten(self) -> int:
        """Tensors still to be written before the model may serve."""
        return len(self._unwritten)

    def _require_memory(self) -> None:
        if self.state == "released":
            raise InvalidRequest("the weights are released: call /resume_memory_occupation first")


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
