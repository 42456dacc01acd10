"""Hugging Face export: a folder that any engine or `from_pretrained` loads, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf")
_OWN = {"config.json", "generation_config.json"}


def write_hf_export(
    directory: Path, *, model: Any, tensors: Mapping[str, torch.Tensor], source: Path
) -> None:
    """Write config, safetensors and the source's other files; replaces what is there.

    Args:
        directory: where to.
        model: the transformers model, for its config and naming rules.
        tensors: name -> whole CPU tensor, tied ones once.
        source: the model's original folder; tokenizer, chat template and the like are copied from it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh, state_dict=dict(tensors), safe_serialization=True)
    make_readable(fresh)
    for item in source.iterdir():
        if item.is_file() and item.name not in _OWN and not item.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(item, fresh / item.name)
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def make_readable(directory: Path) -> None:
    """Let everybody read a folder's weights: safetensors gives them to the writer alone."""
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)
