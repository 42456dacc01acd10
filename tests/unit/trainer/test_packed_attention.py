"""Packing leaks nothing: a packed sequence scores as it does alone, for several architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from milepost_trainer.batch import MicroBatch, SequenceBatch, TrainSequence
from milepost_trainer.head import score_tokens
from milepost_trainer.layout import PackedLayout
from milepost_trainer.policy import Policy, load_policy


def _sequences(seed: int = 0, lengths: tuple[int, ...] = (7, 3, 20, 9, 2, 20, 11)) -> list[TrainSequence]:
    rng = np.random.default_rng(seed)
    made: list[TrainSequence] = []
    for size in lengths:
        mask = np.zeros(size, np.uint8)
        mask[max(1, size // 3) :] = 1
        made.append(
            TrainSequence(
                tokens=rng.integers(0, 16, size).astype(np.int32),
                loss_mask=mask,
                logprobs=np.zeros(size, np.float32),
            )
        )
    return made


def _packed(sequences: list[TrainSequence]) -> MicroBatch:
    batch = SequenceBatch.concatenate(sequences)
    weights = np.ones(len(sequences), np.float32)
    return batch.micro_batch(range(len(sequences)), token_weights=weights)


def _plain_logprobs(policy: Policy, sequence: TrainSequence) -> torch.Tensor:
    """Log-probs by the library's own attention, one sequence at a time, without packing."""
    lm = AutoModelForCausalLM.from_config(policy.lm.config, attn_implementation="sdpa", dtype=torch.float64)
    lm.load_state_dict(policy.lm.state_dict())
    ids = torch.from_numpy(sequence.tokens.astype(np.int64))
    with torch.no_grad():
        scores = torch.log_softmax(lm(input_ids=ids[None], use_cache=False).logits[0], -1)
    picked = scores[:-1].gather(-1, ids[1:, None])[:, 0]
    return picked[torch.from_numpy(sequence.loss_mask[1:].astype(np.bool_))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_packed_equals_alone(any_model_dir: Path, dtype: torch.dtype, tolerance: float) -> None:
    policy = load_policy(any_model_dir, dtype=dtype, initial_weights="random", seed=1)
    sequences = _sequences()
    with torch.no_grad():
        together = policy(_packed(sequences)).logprobs
        alone = torch.cat([policy(_packed([one])).logprobs for one in sequences])
    torch.testing.assert_close(together, alone, rtol=0, atol=tolerance)


def test_alone_equals_the_library(any_model_dir: Path) -> None:
    policy = load_policy(any_model_dir, dtype=torch.float64, initial_weights="random", seed=1)
    sequences = _sequences()
    with torch.no_grad():
        ours = policy(_packed(sequences)).logprobs
    theirs = torch.cat([_plain_logprobs(policy, one) for one in sequences])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_the_library_default_leaks(model_dir: Path) -> None:
    """The control: without our attention, restarting position ids do not separate sequences."""
    config = AutoConfig.from_pretrained(model_dir)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float64).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        packed = lm(input_ids=ids, position_ids=positions).logits[0, 3:]
        alone = lm(input_ids=ids[:, 3:]).logits[0]
    assert (packed - alone).abs().max() > 1e-4


def test_attention_refuses_to_run_without_a_layout(model_dir: Path) -> None:
    policy = load_policy(model_dir, dtype=torch.float32, initial_weights="random")
    with pytest.raises(ValueError, match="layout is missing"):
        policy.lm(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)


def test_attention_refuses_a_layout_of_another_row(model_dir: Path) -> None:
    policy = load_policy(model_dir, dtype=torch.float32, initial_weights="random")
    layout = PackedLayout.from_lengths([2, 2])
    with pytest.raises(ValueError, match="do not fit a layout of 4 tokens"):
        policy.lm(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False, layout=layout)


def test_gradients_of_packed_and_alone_agree(model_dir: Path) -> None:
    policy = load_policy(model_dir, dtype=torch.float64, initial_weights="random", seed=2)
    sequences = _sequences(3)
    policy(_packed(sequences)).logprobs.sum().backward()
    together = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    for one in sequences:
        policy(_packed([one])).logprobs.sum().backward()
    for ours, theirs in zip(together, policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=0, atol=1e-10)


def test_the_head_in_chunks_equals_the_head_at_once() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (37,))
    heat = torch.rand(37, dtype=torch.float64) + 0.5
    results = []
    for chunk in (1000, 5):
        scores = score_tokens(
            hidden, weight, target=target, temperature=heat, chunk_tokens=chunk, with_entropy=True
        )
        grads = torch.autograd.grad(scores.logprobs.square().sum(), (hidden, weight))
        results.append((scores.logprobs, scores.entropy, *grads))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-12)
    probabilities = torch.softmax(hidden @ weight.T / heat[:, None], -1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    torch.testing.assert_close(results[0][1], entropy.detach(), rtol=0, atol=1e-12)


def test_micro_batches_feed_only_what_is_needed() -> None:
    """Tokens after the last predicted one, and the last one itself, never reach the model."""
    one = TrainSequence(
        tokens=np.arange(8, dtype=np.int32),
        loss_mask=np.array([0, 0, 1, 0, 1, 0, 0, 0], np.uint8),
        logprobs=np.linspace(-1, 0, 8).astype(np.float32),
        temperature=0.5,
        advantage=2.0,
    )
    empty = TrainSequence(
        tokens=np.arange(3, dtype=np.int32), loss_mask=np.zeros(3, np.uint8), logprobs=np.zeros(3, np.float32)
    )
    batch = SequenceBatch.concatenate([empty, one])
    micro = batch.micro_batch([0, 1], token_weights=np.array([9.0, 0.25], np.float32))
    assert micro.input_ids.tolist() == [[0, 1, 2, 3]]
    assert micro.source.tolist() == [1, 3]
    assert micro.target.tolist() == [2, 4]
    assert micro.temperature is not None
    assert micro.temperature.tolist() == [0.5, 0.5]
    assert micro.advantages.tolist() == [2.0, 2.0]
    assert micro.weights.tolist() == [0.25, 0.25]
    np.testing.assert_allclose(micro.old_logprobs.numpy(), one.logprobs[[2, 4]])


def test_sequences_that_cannot_be_trained_are_refused() -> None:
    tokens = np.arange(3, dtype=np.int32)
    mask = np.array([1, 1, 1], np.uint8)
    logprobs = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"loss_mask\[0\] is 1"):
        SequenceBatch.concatenate([TrainSequence(tokens=tokens, loss_mask=mask, logprobs=logprobs)])
    with pytest.raises(ValueError, match="logprobs has 2 entries and tokens 3"):
        SequenceBatch.concatenate([TrainSequence(tokens=tokens, loss_mask=mask, logprobs=logprobs[:2])])
