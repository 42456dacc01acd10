"""The policy: a Hugging Face causal LM that answers packed tokens with log-probs, not logits.

    MicroBatch --decoder, packed attention--> hidden [T, H] --rows that predict--> [M, H] --head--> scores [M]

Logits exist for a chunk of tokens at a time (``head``). The wrapper is the root module that a backend shards:
parameters of the head are whole while its forward runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from milepost_trainer import attention
from milepost_trainer.batch import MicroBatch
from milepost_trainer.head import Slope, TokenScores, score_tokens

_UNSUPPORTED_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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

    def forward(
        self, batch: MicroBatch, *, with_entropy: bool = False, slope: Slope | None = None
    ) -> TokenScores:
        """Score every predicted token of a micro-batch; ``slope`` as in ``score_tokens``."""
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
            slope=slope,
        )


def load_policy(
    model_dir: Path,
    *,
    dtype: torch.dtype,
    initial_weights: str = "load",
    seed: int = 0,
    head_chunk_tokens: int = 4096,
    device: torch.device | None = None,
) -> Policy:
    """Build the policy from a Hugging Face directory; what is loaded is on the CPU.

    Args:
        model_dir: holds ``config.json`` and, unless weights are random, safetensors.
        dtype: of the parameters.
        initial_weights: "load", or "random" to draw them from ``seed``.
        seed: of random weights.
        head_chunk_tokens: see ``Policy``.
        device: where random weights are drawn; each kind of device draws its own. None for the CPU.

    Returns:
        The policy in training mode.

    Raises:
        FileNotFoundError: the directory has no ``config.json``.
    """
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(
            f"model_dir is {model_dir}: it holds no config.json; name a Hugging Face directory"
        )
    lm = load_lm(
        model_dir,
        implementation=attention.register(),
        dtype=dtype,
        initial_weights=initial_weights,
        seed=seed,
        device=device,
    )
    return Policy(lm, head_chunk_tokens=head_chunk_tokens).train()


def load_lm(
    model_dir: Path,
    *,
    implementation: str,
    dtype: torch.dtype,
    initial_weights: str = "load",
    seed: int = 0,
    device: torch.device | None = None,
) -> nn.Module:
    """A causal LM of transformers, attention by the name in its tables; else see ``load_policy``."""
    disable_progress_bar()
    if initial_weights != "random":
        return cast(
            nn.Module,
            AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation=implementation, dtype=dtype),
        )
    config = AutoConfig.from_pretrained(model_dir)
    here = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[here] if here.type == "cuda" else []), here:
        torch.manual_seed(seed)
        drawn = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=dtype)
    return cast(nn.Module, drawn)


def meta_lm(model_dir: Path) -> nn.Module:
    """The model without storage: names and shapes alone."""
    with torch.device("meta"):
        return cast(nn.Module, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir)))
