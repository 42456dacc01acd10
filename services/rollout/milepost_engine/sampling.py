"""Drawing the next token of every row at once.

Order of operations, as SGLang's: penalties, biases and minimum-length masks change the logits; the
temperature divides them; **the reported log-prob is log_softmax of that**; top-k, top-p and min-p then only
restrict which token may be drawn. Greedy rows report log-probs at the temperature of the request, or at 1
when it is 0.

A token is drawn by the exponential race: argmax of p / e with e ~ Exp(1) is distributed as p. One noise
tensor serves the whole batch; rows with a seed overwrite theirs from their own generator, so that their draw
does not depend on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from milepost_engine.generation import Generation, TopEntry
from milepost_engine.params import TOP_K_ALL


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token for every row.

    Attributes:
        tokens: Token ids.
        logprobs: Their log-probs in nats.
        top: Best alternatives per row, where any row asked; rows that did not ask have an empty list.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[TopEntry] | None


class SamplingPlan:
    """The sampling parameters of a fixed set of rows, as tensors. Rebuilt when rows come or go.

    Args:
        rows: The generations, in row order.
        shared: Source of randomness of the rows without a seed.
    """

    def __init__(self, rows: Sequence[Generation], *, shared: torch.Generator) -> None:
        self._rows = rows
        self._shared = shared
        params = [row.params for row in rows]
        self._temperature = torch.tensor([p.logprob_temperature for p in params])[:, None]
        self._tempered = any(p.logprob_temperature != 1.0 for p in params)
        greedy = [p.greedy for p in params]
        self._all_greedy = all(greedy)
        self._greedy = torch.tensor(greedy) if any(greedy) else None
        self._top_k = _column([p.top_k for p in params], TOP_K_ALL)
        self._top_p = _column([p.top_p for p in params], 1.0)
        self._min_p = _column([p.min_p for p in params], 0.0)
        self._seeded = [(i, row.generator) for i, row in enumerate(rows) if row.generator is not None]
        self._adjusted = [
            (i, row) for i, row in enumerate(rows) if row.params.penalised or row.params.logit_bias
        ]
        self._minimum = [(i, row) for i, row in enumerate(rows) if row.params.min_new_tokens and row.stop_ids]
        self._top = max((row.logprobs.top for row in rows if row.logprobs.wanted), default=0)

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor) -> Drawn:
        """Draws one token per row from `[rows, vocab]` float32 logits, which it may overwrite."""
        self._adjust(logits)
        if self._tempered:
            logits = logits / self._temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        tokens = self._choose(logprobs)
        chosen = logprobs.gather(1, tokens[:, None])[:, 0]
        return Drawn(tokens.tolist(), chosen.tolist(), self._best(logprobs) if self._top else None)

    def _choose(self, logprobs: torch.Tensor) -> torch.Tensor:
        if self._all_greedy:
            return logprobs.argmax(dim=-1)
        noise = torch.empty_like(logprobs).exponential_(generator=self._shared)
        for row, generator in self._seeded:
            noise[row].exponential_(generator=generator)
        drawn = (self._restricted(logprobs).exp_() / noise).argmax(dim=-1)
        return drawn if self._greedy is None else torch.where(self._greedy, logprobs.argmax(dim=-1), drawn)

    def _restricted(self, logprobs: torch.Tensor) -> torch.Tensor:
        """A fresh tensor in which tokens that top-k, top-p and min-p exclude are -inf."""
        if self._top_k is None and self._top_p is None and self._min_p is None:
            return logprobs.clone()
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        probs = ordered.exp()
        out = torch.zeros_like(ordered, dtype=torch.bool)
        if self._top_k is not None:
            out |= torch.arange(ordered.shape[-1]) >= self._top_k
        if self._top_p is not None:
            out |= probs.cumsum(dim=-1) - probs > self._top_p
        if self._min_p is not None:
            out |= probs < probs[:, :1] * self._min_p
        return ordered.masked_fill_(out, -torch.inf).scatter(1, order, ordered)

    def _adjust(self, logits: torch.Tensor) -> None:
        for row, generation in self._adjusted:
            _penalise(logits[row], generation)
        for row, generation in self._minimum:
            if len(generation.output_ids) < generation.params.min_new_tokens:
                logits[row, list(generation.stop_ids)] = -torch.inf

    def _best(self, logprobs: torch.Tensor) -> list[TopEntry]:
        values, ids = logprobs.topk(min(self._top, logprobs.shape[-1]), dim=-1)
        return [
            list(zip(row_values[: row.logprobs.top], row_ids[: row.logprobs.top], strict=True))
            for row, row_values, row_ids in zip(self._rows, values.tolist(), ids.tolist(), strict=True)
        ]


def _column(values: list[float] | list[int], neutral: float) -> torch.Tensor | None:
    """`[rows, 1]`, or None when no row needs it."""
    return None if all(value == neutral for value in values) else torch.tensor(values)[:, None]


def _penalise(logits: torch.Tensor, generation: Generation) -> None:
    params = generation.params
    for token, bias in params.logit_bias.items():
        logits[token] += bias
    if not generation.output_ids or not params.penalised:
        return
    tokens, counts = torch.tensor(generation.output_ids).unique(return_counts=True)
    seen = logits[tokens]
    scaled = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    logits[tokens] = scaled - params.frequency_penalty * counts - params.presence_penalty


@torch.inference_mode()
def input_logprobs(
    logits: torch.Tensor, tokens: list[int], *, start: int, top: int
) -> tuple[list[float | None], list[TopEntry | None]]:
    """Log-probs of a prompt's own tokens, at temperature 1.

    Args:
        logits: `[positions, vocab]`; position i predicts token i + 1.
        tokens: The prompt.
        start: First position to report; its own entry is None, as SGLang has it.
        top: Best alternatives per position; 0 for none.

    Returns:
        Log-probs and alternatives for tokens `[start, len(tokens))`.
    """
    values: list[float | None] = [None] if start < len(tokens) else []
    best: list[TopEntry | None] = [None] if start < len(tokens) else []
    if start + 1 >= len(tokens):
        return values, best
    logprobs = torch.log_softmax(logits[start : len(tokens) - 1].float(), dim=-1)
    targets = torch.tensor(tokens[start + 1 :])
    values.extend(logprobs.gather(1, targets[:, None])[:, 0].tolist())
    if top:
        top_values, top_ids = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        pairs = zip(top_values.tolist(), top_ids.tolist(), strict=True)
        best.extend(list(zip(v, i, strict=True)) for v, i in pairs)
    return values, best
