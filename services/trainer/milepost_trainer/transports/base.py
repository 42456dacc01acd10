"""How the bytes of a bucket get from rank 0 to the engines.

    open(prepared) -> for each bucket: stage -> (header goes out) -> send -> (acks come in) -> unstage ->
    close

One transport serves many transactions, one at a time. Nothing in it waits without a deadline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from milepost.types import HandlesOfEngine, Prepared, Transport
from milepost_trainer.buckets import Bucket


class WeightTransport(ABC):
    """Moves buckets."""

    kind: Transport
    """What PrepareWeights is told."""

    single_bucket: bool = False
    """True where all weights must travel at once."""

    master_address: str = ""
    """Where engines meet rank 0; empty where they need not."""

    master_port: int = 0
    """Its port."""

    @abstractmethod
    async def open(self, prepared: Prepared, *, timeout_s: float) -> None:
        """Get ready for one transaction, without waiting for its members: `send` does that."""

    @abstractmethod
    async def stage(self, bucket: Bucket, flat: torch.Tensor) -> tuple[HandlesOfEngine, ...]:
        """Put a bucket where engines find it; returns what its header shall carry."""

    async def send(self, bucket: Bucket, flat: torch.Tensor, *, timeout_s: float) -> None:
        """Push a bucket whose header is out; a transport that engines pull from has nothing to do."""
        del bucket, flat, timeout_s

    async def unstage(self, bucket: Bucket) -> None:
        """All members have answered for a bucket."""
        del bucket

    @abstractmethod
    async def close(self, *, broken: bool) -> None:
        """End the transaction; ``broken`` means that members may be stuck in it."""

    async def shut_down(self) -> None:
        """The trainer stops: let go of everything."""
        return
