"""The batched KV cache: whatever rows come and go, logits are those of plain forward passes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milepost_engine.runner import ModelRunner, UnsupportedModel

SLOTS = 5


def _plain(model, tokens):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]


def _close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


prompts = st.lists(st.integers(0, 23), min_size=1, max_size=90)
steps = st.one_of(
    st.tuples(st.just("admit"), st.lists(prompts, min_size=1, max_size=3), st.integers(1, 2)),
    st.tuples(st.just("decode"), st.integers(0, 23), st.just(0)),
    st.tuples(st.just("remove"), st.sets(st.integers(0, SLOTS - 1), min_size=1), st.just(0)),
    st.tuples(st.just("release"), st.just(None), st.just(0)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(steps, min_size=1, max_size=14))
def test_rows_come_and_go(tiny_model, script):
    runner = ModelRunner(tiny_model, max_slots=SLOTS)
    rows: list[list[int]] = []
    for action, argument, copies in script:
        if action == "admit":
            source = [i for i in range(len(argument)) for _ in range(copies)]
            if len(rows) + len(source) > SLOTS:
                continue
            last = runner.prefill(argument, source=source).last
            rows += [list(argument[i]) for i in source]
            for offset, index in enumerate(source):
                _close(last[offset], _plain(tiny_model, argument[index]))
        elif action == "decode" and rows:
            tokens = [(argument + row) % 24 for row in range(len(rows))]
            logits = runner.decode(tokens)
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
            for got, row in zip(logits, rows, strict=True):
                _close(got, _plain(tiny_model, row))
        elif action == "remove":
            gone = [row for row in argument if row < len(rows)]
            if not gone:
                continue
            kept = sorted(map(tuple, (row for i, row in enumerate(rows) if i not in gone)))
            for hole, mover in runner.cache.remove(gone):
                rows[hole] = rows[mover]
            del rows[runner.cache.count :]
            assert sorted(map(tuple, rows)) == kept
            assert runner.cache.lengths[: len(rows)].tolist() == [len(row) for row in rows]
        elif action == "release":
            runner.cache.release()
            rows = []
            assert runner.cache.size_bytes == 0


def test_all_logits_are_those_of_every_position(tiny_model):
    runner = ModelRunner(tiny_model, max_slots=2)
    result = runner.prefill([[1, 2, 3], [4]], source=[0, 1], all_logits=True)
    assert result.all is not None
    for end in (1, 2, 3):
        _close(result.all[0, end - 1], _plain(tiny_model, [1, 2, 3][:end]))
    _close(result.last[1], _plain(tiny_model, [4]))


def test_more_rows_than_slots_is_a_defect_and_says_so(tiny_model):
    runner = ModelRunner(tiny_model, max_slots=1)
    with pytest.raises(ValueError, match="exceed 1 slots"):
        runner.prefill([[1]], source=[0, 0])


def test_self_check_passes_an_ordinary_model_and_leaves_no_rows(tiny_model):
    runner = ModelRunner(tiny_model, max_slots=2)
    runner.self_check()
    assert runner.cache.count == 0
    assert runner.cache.size_bytes == 0


def test_self_check_refuses_a_model_whose_state_is_not_in_the_cache():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=1, state_size=4, use_mambapy=False)
    model = MambaForCausalLM(config).eval().requires_grad_(False)
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        ModelRunner(model, max_slots=2).self_check()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text", "mistral"])
def test_other_architectures_are_served(family):
    """GPT-2 learns its positions, Gemma 3 alternates sliding windows, Mistral has one throughout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    if family in ("gemma3_text", "mistral"):
        sizes["sliding_window"] = 4
    if family == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(family, **common, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    runner = ModelRunner(model, max_slots=3)
    runner.self_check()
    rows = [[5, 6, 7, 8, 9, 10, 11, 3], [4, 2]]
    runner.prefill(rows, source=[0, 1])
    for token in (12, 13, 14):
        logits = runner.decode([token, token + 1])
        rows = [[*rows[0], token], [*rows[1], token + 1]]
        for got, row in zip(logits, rows, strict=True):
            _close(got, _plain(model, row))
