"""The model and its forward passes: a batched prefill and a batched decode step over one `SlotCache`.

Any Hugging Face causal LM with ordinary attention works: masks and positions are always given, so nothing
depends on what a model would derive from padding. Models with other caches (state-space, cross-layer) are
found out at start by `self_check`, which compares cached against plain forward passes, rather than by wrong
samples.

Owned by the scheduler thread once serving has begun.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from milepost_engine.kv_cache import SlotCache

_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_DEFAULT_CONTEXT = 4096


class UnsupportedModel(RuntimeError):
    """The model cannot be served by this engine. Fatal at start."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """What a prefill yields.

    Attributes:
        last: `[rows, vocab]` float32 logits after the last token of each new row.
        all: `[prompts, positions, vocab]` logits of every position, when asked for.
    """

    last: torch.Tensor
    all: torch.Tensor | None


def load_model(
    path: Path, *, dtype: torch.dtype, load_format: Literal["auto", "dummy"], seed: int
) -> PreTrainedModel:
    """Builds the model of a local directory.

    Weights are random (from `seed`) when `load_format` is "dummy", or the directory has a config and no
    weights.

    Raises:
        UnsupportedModel: There is no config, or transformers has no causal LM for it.
    """
    if not (path / "config.json").is_file():
        raise UnsupportedModel(
            f"model is '{path}', which holds no config.json: name a Hugging Face model folder"
        )
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if load_format == "dummy" or not any((*path.glob("*.safetensors"), *path.glob("*.bin"))):
            torch.manual_seed(seed)
            model = _from_config(config, dtype)
        else:
            model = _from_folder(path, dtype)
    except (ValueError, OSError, KeyError) as error:
        raise UnsupportedModel(f"model '{path}' does not load as a causal LM: {error}") from error
    model = cast(PreTrainedModel, model)
    model.eval()
    return model.requires_grad_(False)


def _from_config(config: Any, dtype: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except ValueError:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


def _from_folder(path: Path, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    try:
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", **options)
    except ValueError:
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)


class ModelRunner:
    """Runs forward passes for the scheduler.

    Args:
        model: The causal LM, in eval mode.
        max_slots: Rows of the running batch.
    """

    def __init__(self, model: PreTrainedModel, *, max_slots: int) -> None:
        self.model = model
        self.cache = SlotCache(max_slots=max_slots)
        text_config = model.config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.model_context = int(getattr(text_config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
        self._eager = getattr(model.config, "_attn_implementation", "sdpa") == "eager"
        self._layer_types: set[str] = set(getattr(text_config, "layer_types", None) or ())
        self._window: int | None = getattr(text_config, "sliding_window", None)
        if not self._layer_types and not getattr(text_config, "use_sliding_window", True):
            self._window = None
        self._trims_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], *, source: list[int], all_logits: bool = False) -> Prefill:
        """Computes prompts and stores them as new rows of the cache.

        Args:
            prompts: Distinct token sequences, none empty.
            source: For each new row, the index into `prompts` it starts from.
            all_logits: Also return the logits of every position.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        span = int(lengths.max())
        tokens = torch.zeros((len(prompts), span), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        self.cache.plan_prefill([len(prompts[index]) for index in source], source=source)
        positions = torch.arange(span)
        # Padding is on the right: causality alone keeps it out of every real position.
        mask = (positions[None, :] <= positions[:, None])[None, None]
        ends, which = torch.unique(lengths - 1, return_inverse=True)
        keep = ends if self._trims_logits and not all_logits else None
        logits = self._forward(tokens, mask, positions[None].expand(len(prompts), span), keep)
        self.cache.advance()
        last = logits[torch.arange(len(prompts)), which if keep is not None else lengths - 1]
        return Prefill(last[torch.tensor(source)].float(), logits if all_logits else None)

    @torch.inference_mode()
    def decode(self, last_tokens: list[int]) -> torch.Tensor:
        """Adds one token to every row; returns `[rows, vocab]` float32 logits after it."""
        mask = self.cache.plan_decode()
        positions = self.cache.lengths[: self.cache.count, None]
        logits = self._forward(torch.tensor(last_tokens)[:, None], mask, positions, None)
        self.cache.advance()
        return logits[:, -1].float()

    def _forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        options: dict[str, Any] = {} if keep is None else {"logits_to_keep": keep}
        output = self.model(
            input_ids=tokens,
            attention_mask=self._masks(mask, positions),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **options,
        )
        return output.logits

    def _masks(self, full: torch.Tensor, positions: torch.Tensor) -> Any:
        if self._window is None or not (
            self._layer_types == set() or "sliding_attention" in self._layer_types
        ):
            return self._as_model_wants(full)
        seen = torch.arange(full.shape[-1])
        near = full & (seen > positions[:, None, :, None] - self._window)
        if not self._layer_types:
            return self._as_model_wants(near)
        masks = {"full_attention": full, "sliding_attention": near}
        return {kind: self._as_model_wants(mask) for kind, mask in masks.items() if kind in self._layer_types}

    def _as_model_wants(self, mask: torch.Tensor) -> torch.Tensor:
        if not self._eager:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)

    @torch.inference_mode()
    def self_check(self) -> None:
        """Compares prefill and decode with plain forward passes on two sequences of unequal length.

        Raises:
            UnsupportedModel: They disagree, so this model's cache is not one the engine can keep.
        """
        step = max(self.vocab_size // 11, 1)
        first = [(3 + index * step) % self.vocab_size for index in range(5)]
        second = list(reversed(first))[:3]
        try:
            got = [self.prefill([first, second], source=[0, 1]).last]
            got.append(self.decode([second[0], first[0]]))
            got.append(self.decode([second[1], first[1]]))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            name = type(self.model).__name__
            raise UnsupportedModel(f"{name} cannot run with a slot cache: {error}") from error
        finally:
            self.cache.release()
        full = [[*first, second[0], second[1]], [*second, first[0], first[1]]]
        for row, tokens in enumerate(full):
            plain = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -3:].float()
            self._compare(plain, torch.stack([logits[row] for logits in got]))

    def _compare(self, plain: torch.Tensor, cached: torch.Tensor) -> None:
        error = float((plain - cached).abs().max() / plain.abs().max().clamp_min(1e-6))
        if not error <= _SELF_CHECK_TOLERANCE.get(self.model.dtype, 0.1):
            raise UnsupportedModel(
                f"{type(self.model).__name__}: cached logits differ from plain ones by {error:.2g} of their "
                "size, so this architecture keeps state that the engine's KV cache does not hold"
            )
