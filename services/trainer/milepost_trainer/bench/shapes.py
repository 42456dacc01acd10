"""Shapes to measure: configurations by name, and how much arithmetic a token costs.

    floating-point operations of a step = 6 N T + 6 layers * heads * head_dim * sum of squared lengths

N counts every parameter once (a tied embedding is the head), T the tokens fed. The second term is causal
attention: two products of L * L / 2 * head_dim each, forward once and backward twice, 2 operations each.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, Qwen3Config

from milepost.errors import InvalidArgument

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-1.7b": _QWEN3
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": _QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "tiny": _QWEN3
    | {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}

_PEAKS = {"H100": 989.0, "H200": 989.0, "H800": 989.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0}
"""Dense bf16 TFLOP/s by the vendor's data sheets."""


@dataclass(frozen=True)
class Arithmetic:
    """What a model costs.

    Attributes:
        parameters: N.
        per_square: operations for each squared token of a sequence's length.
    """

    parameters: int
    per_square: int

    def by_parameters(self, num_tokens: int) -> int:
        """6 N T."""
        return 6 * self.parameters * num_tokens

    def whole(self, lengths: Iterable[int]) -> int:
        """6 N T and attention."""
        sizes = list(lengths)
        return self.by_parameters(sum(sizes)) + self.per_square * sum(size * size for size in sizes)


def arithmetic(config: Any, parameters: Sequence[torch.Tensor]) -> Arithmetic:
    """Of a transformers configuration and the parameters of its model (or their meta tensors)."""
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Arithmetic(
        parameters=sum(parameter.numel() for parameter in parameters),
        per_square=6 * text.num_hidden_layers * heads * head_dim,
    )


@contextmanager
def model_folder(name: str) -> Generator[Path]:
    """The folder that `name` is, or one that holds the configuration of that name as long as it is open.

    Raises:
        InvalidArgument: it is neither.
    """
    if (Path(name) / "config.json").is_file():
        yield Path(name)
    elif name in SHAPES:
        with TemporaryDirectory(prefix="milepost-bench-") as folder:
            Qwen3Config(**SHAPES[name]).save_pretrained(folder)
            yield Path(folder)
    else:
        raise InvalidArgument(
            f"trainer.model_dir is {name}: name a folder with a config.json, or one of {', '.join(SHAPES)}"
        )


def load_config(folder: Path) -> Any:
    """The configuration in a folder."""
    return AutoConfig.from_pretrained(folder)


def peak_tflops(device: torch.device) -> float:
    """Of the device in bfloat16; 0 where it is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), 0.0)
