"""What the ranks tell one another when one runs out of memory, and how much smaller the plan becomes.

    shortages of all ranks --smaller_budget()--> tokens of a micro-batch from now on, the same on every rank

Each shortage splits the micro-batch that did not fit, until it is one sequence, which cannot be split: so the
tries end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from milepost.errors import ResourceExhausted


class SequenceDoesNotFit(ResourceExhausted):
    """One sequence alone is more than a rank has memory for; the message names it and what would help."""


@dataclass(frozen=True)
class Shortage:
    """A micro-batch that a rank had no memory for.

    Attributes:
        rank: which one.
        num_tokens: of the micro-batch, as the plan counts them.
        num_sequences: it held; 0 for the dummy of an idle rank.
        prompt_id: of its longest sequence.
        sample: index of that sequence in its group.
        longest: tokens of that sequence.
    """

    rank: int
    num_tokens: int
    num_sequences: int
    prompt_id: str = ""
    sample: int = 0
    longest: int = 0

    def __str__(self) -> str:
        """In words."""
        return (
            f"rank {self.rank} had no memory for {self.num_tokens} tokens in {self.num_sequences} sequences; "
            f"from now on micro-batches hold at most {self.num_tokens // 2} tokens"
        )


def smaller_budget(shortages: Sequence[Shortage]) -> int:
    """Tokens of a micro-batch after these shortages: half of the largest that did not fit.

    Args:
        shortages: of all ranks; at least one.

    Raises:
        SequenceDoesNotFit: one of them cannot be split.
    """
    for short in shortages:
        if short.num_sequences <= 1 or short.num_tokens <= 1:
            raise SequenceDoesNotFit(
                f"rank {short.rank} has no memory for one sequence alone: {short.longest} tokens, sample "
                f"{short.sample} of prompt {short.prompt_id!r}; lower run.sampling.max_new_tokens, or give "
                "the trainer room: trainer.fsdp.activation_checkpointing, trainer.offload, a smaller "
                'head_chunk_tokens, more ranks; on_poison = "drop" leaves such a step out in the end'
            )
    return max(short.num_tokens for short in shortages) // 2
