"""Shared pieces: a tiny model, generations, and listeners that remember."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from milepost_engine.generation import Generation, LogprobOptions
from milepost_engine.params import SamplingParams

VOCABULARY = 24


class Remembering:
    """A listener that keeps what it was told."""

    def __init__(self):
        self.told = []

    def on_progress(self, generation):
        self.told.append(generation)


@pytest.fixture(scope="session")
def tiny_model():
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def new_generation():
    """Builds generations: `new_generation([1, 2], max_new_tokens=4, temperature=0.0)`."""

    def build(prompt, *, rid="r", max_new_tokens=8, stop_ids=(), logprobs=None, stream=False, **sampling):
        return Generation(
            rid=rid,
            prompt_ids=list(prompt),
            params=SamplingParams(max_new_tokens=max_new_tokens, **sampling),
            logprobs=logprobs or LogprobOptions(wanted=True),
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset(stop_ids),
            stream=stream,
            listener=Remembering(),
        )

    return build
