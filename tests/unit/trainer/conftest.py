"""Tiny models and sequences for the trainer's unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

_SHAPE = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3-gqa-tied": Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "qwen2-bias": Qwen2Config(**_SHAPE, num_key_value_heads=2),
    "llama-mha": LlamaConfig(**_SHAPE, num_key_value_heads=4),
    "llama-gqa": LlamaConfig(**_SHAPE, num_key_value_heads=1),
    "mistral-window": MistralConfig(**_SHAPE, num_key_value_heads=2, sliding_window=5),
}


@pytest.fixture(params=sorted(CONFIGS))
def any_model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the config of each architecture in turn."""
    CONFIGS[request.param].save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with a tiny Qwen3 config and something that stands for a tokenizer."""
    folder = tmp_path / "model"
    CONFIGS["qwen3-gqa-tied"].save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
