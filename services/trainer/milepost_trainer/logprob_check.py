"""Asks engines, after a publication, what they make of the weights that they were given. For debugging.

    publication ──> each engine that serves it generates TOKENS tokens from a prompt of random ones
                    ──> the same tokens through the trainer's forward pass ──> largest difference of log-probs

It goes to engines past the router, costs a forward pass of every rank, and holds the step up meanwhile. What
cannot be asked is told in the log and not counted; nothing is raised for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from milepost import types as t
from milepost_trainer.crew import Crew

log = logging.getLogger(__name__)

PROMPT_TOKENS, TOKENS = 8, 16
ASK_S = 30.0


class LogprobCheck:
    """Compares engines with the trainer.

    Args:
        crew: the ranks; rank 0's forward pass is the reference.
        vocab_size: token ids of prompts are below it.
        tolerance: differences above it are warned of, in nats.
    """

    def __init__(self, crew: Crew, *, vocab_size: int, tolerance: float) -> None:
        self._crew, self._vocab_size, self._tolerance = crew, vocab_size, tolerance

    async def run(self, step: int, engines: Sequence[t.Engine]) -> float | None:
        """The largest difference of any engine, in nats; None where none could be asked."""
        found = [await self._check(step, engine) for engine in engines]
        return max((each for each in found if each is not None), default=None)

    async def _check(self, step: int, engine: t.Engine) -> float | None:
        prompt = random.Random(step).choices(range(self._vocab_size), k=PROMPT_TOKENS)
        try:
            output, theirs = await asyncio.to_thread(_generate, engine.url, prompt)
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            log.warning("step %d: log-probs of engine %s not checked: %s", step, engine.engine_id, error)
            return None
        ours: list[float] = await self._crew.call("score", prompt, output)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        if worst > self._tolerance:
            log.warning(
                "step %d: log-probs of engine %s are up to %.4f nats from the trainer's, more than "
                "debug.logprob_tolerance = %g: its weights, its dtype or its kernels differ",
                step, engine.engine_id, worst, self._tolerance,
            )  # fmt: skip
        else:
            log.info("step %d: log-probs of engine %s agree within %.2g", step, engine.engine_id, worst)
        return worst


def _generate(url: str, prompt: Sequence[int]) -> tuple[list[int], list[float]]:
    """Tokens of one engine, and what it says of them."""
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True}
    request = urllib.request.Request(
        url.rstrip("/") + "/generate",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=ASK_S) as reply:
        said: Any = json.loads(reply.read())
    output, logprobs = said["output_ids"], said["meta_info"]["output_token_logprobs"]
    if not output or len(output) != len(logprobs):
        raise ValueError(f"{len(output)} tokens and {len(logprobs)} log-probs")
    return [int(token) for token in output], [float(entry[0]) for entry in logprobs]
