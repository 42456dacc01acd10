"""Proof that engines served whole weights under their own name: every recorded log-prob, computed anew.

    payload --spans--> version --ledger--> label --checkpoint--> weights --forward pass--> log-probs, compared

The forward pass is transformers' own, over the whole sequence at once, without a cache: nothing of what it
checks is part of it. A span whose label is wrong, or whose weights were a mixture, differs (`shifted` and
`mixture` show by how much).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_loader
from transformers import AutoModelForCausalLM

from milepost.types import GroupPayload, Sample

TOLERANCE = 1e-4
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens [start, end) of a sample, and the label of the weights that are said to have made them."""

    prompt_id: str
    sample: Sample
    start: int
    end: int
    label: int


def spans_of(payloads: Iterable[GroupPayload], labels: Mapping[int, int]) -> list[Span]:
    """Every span of every sample; `labels` is version -> label."""
    return [
        Span(payload.prompt.prompt_id, sample, span.start, span.end, labels[span.weight_version])
        for payload in payloads
        for sample in payload.samples
        for span in sample.version_spans
        if sample.loss_mask[span.start : span.end].any()
    ]


class Forward:
    """Log-probs of spans under weights of our choice.

    Args:
        model_dir: the architecture.
        folder: checkpoint folder of a label.
    """

    def __init__(self, model_dir: Path, folder: Callable[[int], Path]) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
        self._folder = folder
        self._named = dict(self._model.named_parameters())
        self._loaded: dict[int, Weights] = {}

    def weights(self, label: int) -> Weights:
        """Of the checkpoint of that step; kept, for they are small."""
        if label not in self._loaded:
            self._loaded[label] = self._load(label)
        return self._loaded[label]

    def _load(self, label: int) -> Weights:
        state = {"model": {name: torch.empty_like(x) for name, x in self._named.items()}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_loader.load(state, checkpoint_id=self._folder(label) / "state", no_dist=True)
        return state["model"]

    def distance(self, one: int, other: int) -> float:
        """The largest difference of any weight between two labels."""
        a, b = self.weights(one), self.weights(other)
        return max(float((a[name] - b[name]).abs().max()) for name in a)

    def mixture(self, label: int) -> Weights:
        """Half of the tensors of a label, half of the one after it."""
        old, new = self.weights(label), self.weights(label + 1)
        return {name: (old if i % 2 else new)[name] for i, name in enumerate(old)}

    def deviations(
        self, spans: Sequence[Span], weights_of: Callable[[int], Weights] | None = None
    ) -> dict[Span, float]:
        """Largest difference in each span between what was recorded and what `weights_of(label)` say."""
        by_label: dict[int, list[Span]] = defaultdict(list)
        for span in spans:
            by_label[span.label].append(span)
        found: dict[Span, float] = {}
        for label, group in sorted(by_label.items()):
            with torch.no_grad():
                for name, tensor in (weights_of or self.weights)(label).items():
                    self._named[name].copy_(tensor)
            found |= self._compare(group)
        return found

    @torch.no_grad()
    def _compare(self, spans: Sequence[Span]) -> dict[Span, float]:
        longest = max(len(s.sample.tokens) for s in spans)
        tokens = torch.zeros(len(spans), longest, dtype=torch.int64)  # causal: what is padded after is unseen
        for row, span in zip(tokens, spans, strict=True):
            row[: len(span.sample.tokens)] = torch.from_numpy(span.sample.tokens.astype(np.int64))
        scores = torch.log_softmax(self._model(input_ids=tokens).logits, dim=-1)[:, :-1]
        said = scores.gather(-1, tokens[:, 1:, None])[..., 0].numpy()
        return {span: _difference(span, said[i]) for i, span in enumerate(spans)}


def _difference(span: Span, said: np.ndarray) -> float:
    """`said[i]` is the log-prob of token i + 1."""
    made = np.flatnonzero(span.sample.loss_mask[span.start : span.end]) + span.start
    return float(np.abs(said[made - 1] - span.sample.logprobs[made]).max())
