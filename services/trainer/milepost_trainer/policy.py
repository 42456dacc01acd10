"""The policy: a Hugging Face causal LM that answers packed tokens with log-probs, not logits.

    MicroBatch --decoder, packed attention--> hidden [T, H] --rows that predict--> [M, H] --head--> scores [M]

The LM head works in chunks of tokens that are computed again in the backward pass, so ``[tokens,
vocabulary]`` never exists at once. The wrapper is the root module that a backend shards: parameters of the
head are whole while its forward runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from milepost_trainer import attention
from milepost_trainer.batch import MicroBatch

_UNSUPPORTED_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class TokenScores:
    """What the policy says of each predicted token.

    Attributes:
        logprobs: float32 [M], nats, at the sampling temperature.
        entropy: float32 [M], nats, without gradient; None when not asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


class Policy(nn.Module):
    """A causal LM behind one forward: micro-batch in, token scores out."""

    def __init__(self, lm: nn.Module, *, head_chunk_tokens: int = 4096) -> None:
        """Wrap a model loaded with our attention.

        Args:
            lm: a transformers causal LM.
            head_chunk_tokens: tokens whose logits exist at once.

        Raises:
            NotImplementedError: the architecture changes logits after the head.
        """
        super().__init__()
        config: Any = lm.config
        changed = [name for name in _UNSUPPORTED_HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
        if changed:
            raise NotImplementedError(
                f"{type(lm).__name__} sets {', '.join(changed)}, which the head does not apply"
            )
        self.lm = lm
        self.head_chunk_tokens = head_chunk_tokens

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers: the units of sharding and of activation checkpointing."""
        return cast(nn.ModuleList, cast(Any, self.lm).get_decoder().layers)

    def forward(self, batch: MicroBatch, *, with_entropy: bool = False) -> TokenScores:
        """Score every predicted token of a micro-batch."""
        lm = cast(Any, self.lm)
        hidden = lm.get_decoder()(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, layout=batch.layout
        ).last_hidden_state[0]
        head = lm.get_output_embeddings()
        return score_tokens(
            hidden.index_select(0, batch.source),
            head.weight,
            bias=getattr(head, "bias", None),
            target=batch.target,
            temperature=batch.temperature,
            chunk_tokens=self.head_chunk_tokens,
            with_entropy=with_entropy,
        )


def score_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    chunk_tokens: int = 4096,
    with_entropy: bool = False,
) -> TokenScores:
    """Log-softmax of ``hidden @ weight.T / temperature`` at the target tokens, chunk by chunk.

    Args:
        hidden: [M, H] hidden states that predict.
        weight: [V, H] of the LM head.
        target: int64 [M].
        bias: [V] or None.
        temperature: float32 [M] or None for 1.
        chunk_tokens: tokens whose logits exist at once; above it, logits are computed again in backward.
        with_entropy: also return the entropy of each position.

    Returns:
        Scores of all M tokens.
    """
    size = hidden.shape[0]
    if size <= chunk_tokens:
        return TokenScores(*_score_chunk(hidden, weight, bias, target, temperature, with_entropy))
    logprobs: list[torch.Tensor] = []
    entropy: list[torch.Tensor] = []
    for start in range(0, size, chunk_tokens):
        cut = slice(start, start + chunk_tokens)
        heat = None if temperature is None else temperature[cut]
        part = checkpoint(
            _score_chunk, hidden[cut], weight, bias, target[cut], heat, with_entropy, use_reentrant=False
        )
        part_logprobs, part_entropy = cast(tuple[torch.Tensor, torch.Tensor | None], part)
        logprobs.append(part_logprobs)
        if part_entropy is not None:
            entropy.append(part_entropy)
    return TokenScores(torch.cat(logprobs), torch.cat(entropy) if entropy else None)


def _score_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    logits = nn.functional.linear(hidden, weight, bias)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if temperature is not None:
        logits = logits / temperature[:, None]
    scores = torch.log_softmax(logits, dim=-1)
    entropy = None
    if with_entropy:
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
    return scores.gather(-1, target[:, None])[:, 0], entropy


def load_policy(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    initial_weights: str = "load",
    seed: int = 0,
    head_chunk_tokens: int = 4096,
) -> Policy:
    """Build the policy from a Hugging Face directory, on the CPU.

    Args:
        model_dir: holds ``config.json`` and, unless weights are random, safetensors.
        dtype: of the parameters.
        initial_weights: "load", or "random" to draw them from ``seed``.
        seed: of random weights.
        head_chunk_tokens: see ``Policy``.

    Returns:
        The policy in training mode.

    Raises:
        FileNotFoundError: the directory has no ``config.json``.
    """
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(
            f"model_dir is {model_dir}: it holds no config.json; name a Hugging Face directory"
        )
    name = attention.register()
    disable_progress_bar()
    if initial_weights == "random":
        config = AutoConfig.from_pretrained(model_dir)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=dtype)
    else:
        lm = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=name, dtype=dtype)
    return Policy(cast(nn.Module, lm), head_chunk_tokens=head_chunk_tokens).train()
