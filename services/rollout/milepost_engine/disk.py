"""Weights from a folder of safetensors files: `model.safetensors`, or an index and its shards.

Headers are read first, so that names, shapes and dtypes can be checked before any tensor is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from milepost_engine.errors import UpdateRefused
from milepost_engine.weights import TensorSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        files: The safetensors files.
        specs: Every tensor in them.
    """

    files: list[Path]
    specs: list[TensorSpec]


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the headers of a folder.

    Raises:
        UpdateRefused: The folder is missing, holds no safetensors, or a file is not readable as such.
    """
    if not path.is_dir():
        raise UpdateRefused(
            f"model_path is '{path}', which is no folder on this machine: name one the engine sees"
        )
    files = _files(path)
    try:
        return Checkpoint(files, [spec for file in files for spec in _header(file)])
    except (SafetensorError, OSError, ValueError) as error:
        raise UpdateRefused(f"model_path '{path}' is not readable: {error}") from error


def _files(path: Path) -> list[Path]:
    index = path / _INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return [path / Path(name).name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UpdateRefused(f"'{index}' is not an index of safetensors files: {error}") from error
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UpdateRefused(
            f"model_path is '{path}', which holds no .safetensors file: save the model there first"
        )
    return files


def _header(file: Path) -> list[TensorSpec]:
    with _open(file) as handle:
        specs: list[TensorSpec] = []
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            part = handle.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise UpdateRefused(f"tensor '{name}' in '{file}' is {part.get_dtype()}, which is not read")
            specs.append(TensorSpec(name, dtype, tuple(part.get_shape())))
        return specs


def read_checkpoint(checkpoint: Checkpoint) -> list[tuple[str, torch.Tensor]]:
    """Reads every tensor.

    Raises:
        UpdateRefused: A file changed or broke since its header was read.
    """
    tensors: list[tuple[str, torch.Tensor]] = []
    try:
        for file in checkpoint.files:
            with _open(file) as handle:
                tensors.extend((name, handle.get_tensor(name)) for name in handle.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UpdateRefused(f"a tensor cannot be read: {error}") from error
    expected = {spec.name: (spec.dtype, spec.shape) for spec in checkpoint.specs}
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors} != expected:
        raise UpdateRefused(
            "the folder changed while it was read: write checkpoints to a folder of their own"
        )
    return tensors


def _open(file: Path) -> Any:
    return safe_open(str(file), framework="pt", device="cpu")
