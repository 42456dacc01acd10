"""How the bytes of a bucket get from rank 0 to the engines.

    open(prepared) -> for each bucket: stage -> (header goes out) -> send -> (acks come in) -> unstage ->
    flush -> close

One transport serves many transactions, one at a time. Nothing in it waits without a deadline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

import torch

from milepost.types import HandlesOfEngine, Prepared, TensorSpec, Transport
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

    prepares_ahead: bool = False
    """True where a transaction may be opened while its weights are still made: nobody has to join a group."""

    group_name: str = ""
    """The process group that rank 0 is in already; empty: none."""

    nccl_version: str = ""
    """Of the NCCL that engines must have too; empty: any."""

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

    async def flush(self, *, timeout_s: float) -> None:
        """All buckets are sent and answered for: wait until their bytes have left."""
        del timeout_s

    def shares(self, prepared: Prepared) -> bool:
        """Every member can copy the weights from where they lie, so that no buckets are made of them."""
        del prepared
        return False

    async def share(
        self, prepared: Prepared, manifest: Sequence[TensorSpec], weights: Mapping[str, torch.Tensor]
    ) -> tuple[HandlesOfEngine, ...]:
        """Lets members reach all weights where they lie; returns what the one header shall carry.

        Args:
            prepared: the transaction; `shares` said yes to it.
            manifest: what engines shall see, in order.
            weights: by name, whole; they stay as they are until `close`.
        """
        raise NotImplementedError

    def announces(self, prepared: Prepared) -> bool:
        """Every member can be told of all buckets at once, and takes them as they are sent."""
        del prepared
        return False

    def announce(
        self, prepared: Prepared, buckets: Sequence[Bucket], *, timeout_s: float
    ) -> tuple[HandlesOfEngine, ...]:
        """Says what will be sent; returns what the one header shall carry.

        Args:
            prepared: the transaction; `announces` said yes to it.
            buckets: in sending order.
            timeout_s: how long members may take.
        """
        raise NotImplementedError

    def taken(self, engine_ids: Collection[str]) -> None:
        """These members have what was shared or announced last; the others have failed."""
        del engine_ids

    @abstractmethod
    async def close(self, *, broken: bool) -> None:
        """End the transaction; ``broken`` means that members may be stuck in it."""

    async def shut_down(self) -> None:
        """The trainer stops: let go of everything."""
        return
