"""Weights that are broadcast to the hook in an engine's process: both ends real, over gloo instead of NCCL.

pytest: GlooTransport, orders ── process group ──> a child with a model that loads as SGLang's do
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import pickle
import re
import sys
from base64 import b64decode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from milepost.errors import Unavailable
from milepost.types import Prepared
from milepost_trainer.buckets import Bucket, plan_buckets, read_bucket
from milepost_trainer.transports.gloo import GlooTransport
from milepost_trainer.transports.orders import encode, pushed

SHAPES = {"embed": (10, 8), "q": (4, 8), "k": (4, 8), "v": (4, 8), "down": (8, 4), "norm": (8,)}
BUCKETS = plan_buckets([(n, "float32", s) for n, s in SHAPES.items()], bucket_bytes=300)
GROUP = "run/1/1/1"
CALL_S = 60.0

ENGINE = """
import json, sys, threading
from datetime import timedelta
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d
from milepost_engine import weight_hook, weight_receiver

weight_receiver.GRACE_S = 0.5

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        made = lambda *shape: nn.Parameter(torch.full(shape, 7.0), requires_grad=False)
        self.embed, self.qkv, self.down, self.norm = made(12, 8), made(12, 8), made(8, 4), made(8)
        self.calls = 0

    def load_weights(self, weights):
        self.calls += 1
        if hangs_in == "loader":
            threading.Event().wait()
        for name, loaded in weights:
            if name in ("q", "k", "v"):
                self.qkv.data.narrow(0, "qkv".index(name) * 4, 4).copy_(loaded)
            elif name == "embed":
                self.embed.data[:10].copy_(loaded)
                self.embed.data[10:].fill_(0)
            else:
                getattr(self, name).data.copy_(loaded)

port, name, hangs_in = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if hangs_in == "forming":  # as NCCL's first broadcast does while members are missing
    weight_receiver.dist.broadcast = lambda *_, **__: threading.Event().wait()
timeout = timedelta(seconds=60)
store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
group, _ = c10d._new_process_group_helper(
    2, 1, [], "gloo", c10d.PrefixStore(name, store), group_name=name, timeout=timeout)
c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
model = Model()
for line in sys.stdin:
    weight_hook.load(model, [(line.strip(), torch.empty(0))])
    report = json.loads(bytes(int(x) for x in model.get_weights_by_name(weight_hook.REPORT)))
    weights = {n: p.tolist() for n, p in model.named_parameters()}
    print(json.dumps({**report, "weights": weights, "loader_calls": model.calls}), flush=True)
"""


class Pair:
    """A trainer's end in this process, and the engine's process.

    Attributes:
      held: the trainer's tensors.
    """

    def __init__(self, transport: GlooTransport, engine: asyncio.subprocess.Process) -> None:
        self._transport, self._engine = transport, engine
        self.held: dict[str, torch.Tensor] = {}

    def train(self, seed: int) -> None:
        """Other weights."""
        generator = torch.Generator().manual_seed(seed)
        self.held = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    async def tell(self, text: str) -> None:
        """Gives the engine an order."""
        assert self._engine.stdin is not None
        self._engine.stdin.write(text.encode() + b"\n")
        await self._engine.stdin.drain()

    async def send(self) -> None:
        """Broadcasts every bucket."""
        for bucket in BUCKETS:
            await self._transport.send(bucket, self._flat(bucket), timeout_s=CALL_S)

    def _flat(self, bucket: Bucket) -> torch.Tensor:
        flat = torch.empty(bucket.size_bytes, dtype=torch.uint8)
        for name, place in read_bucket(bucket, flat).items():
            place.copy_(self.held[name])
        return flat

    async def report(self) -> dict[str, Any]:
        """What the engine says of its last order, and its weights."""
        assert self._engine.stdout is not None
        async with asyncio.timeout(CALL_S):
            return json.loads(await self._engine.stdout.readline())

    async def end(self) -> tuple[int, str]:
        """The exit status of the engine's process, and its last words."""
        assert self._engine.stderr is not None
        async with asyncio.timeout(CALL_S):
            words = (await self._engine.stderr.read()).decode()
            return await self._engine.wait(), words

    def expected(self) -> dict[str, list[Any]]:
        """What the model holds when it has got all."""
        held = self.held
        embed = torch.cat([held["embed"], torch.zeros(2, 8)])
        qkv = torch.cat([held["q"], held["k"], held["v"]])
        named = {"embed": embed, "qkv": qkv, "down": held["down"], "norm": held["norm"]}
        return {name: x.tolist() for name, x in named.items()}


@asynccontextmanager
async def pair(*, hangs_in: str = "") -> AsyncIterator[Pair]:
    """Both ends, in one group; the engine gets stuck where the test says."""
    transport = GlooTransport(master_address="127.0.0.1")
    engine = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, str(transport.master_port), GROUP, hangs_in,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE if hangs_in else None, limit=1 << 22,
    )  # fmt: skip
    try:
        await transport.open(Prepared(group_name=GROUP, world_size=2), timeout_s=CALL_S)
        yield Pair(transport, engine)
    finally:
        await transport.close(broken=True)
        if engine.returncode is None:
            engine.kill()
        await engine.wait()


def order(
    transaction: str,
    *,
    depth: int,
    group: str = GROUP,
    buckets: tuple[Bucket, ...] = BUCKETS,
    timeout_s: float = 20.0,
) -> str:
    """As SGLang hands it to the hook."""
    text = pushed(transaction, buckets, group=group, timeout_s=timeout_s, depth=depth)
    (named,) = pickle.loads(b64decode(encode(text)))
    return named[0]


async def test_what_is_broadcast_is_loaded_once_and_copied_from_then_on() -> None:
    assert len(BUCKETS) > 2, "the ring is used more than once"
    async with pair() as both:
        both.train(1)
        await both.tell(order("t1", depth=2))
        await both.send()
        first = await both.report()
        assert (first["transaction"], first["ok"], first["planned"]) == ("t1", True, False), first
        assert first["weights"] == both.expected()
        for seed in (2, 3):
            both.train(seed)
            await both.tell(order(f"t{seed}", depth=0))
            await both.send()
            again = await both.report()
            assert (again["transaction"], again["ok"], again["planned"]) == (f"t{seed}", True, True), again
            assert again["weights"] == both.expected()
            assert again["loader_calls"] == first["loader_calls"]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"depth": 0}, "layout .* is not known here"),
        ({"depth": 2, "group": "another"}, "group 'another' is not known here"),
    ],
)
async def test_an_order_that_cannot_be_done_is_reported_before_anybody_waits(
    told: dict[str, Any], why: str
) -> None:
    async with pair() as both:
        await both.tell(order("t1", **told))
        said = await both.report()
        assert not said["ok"]
        assert re.search(why, said["message"]), said["message"]
        assert set(said["weights"]["norm"]) == {7.0}, "untouched"


async def test_a_layout_has_the_same_name_for_the_same_buckets_alone() -> None:
    def name(buckets: tuple[Bucket, ...]) -> str:
        return json.loads(order("t", depth=0, buckets=buckets))["layout"]

    assert name(BUCKETS) == name(BUCKETS)
    assert name(BUCKETS) != name(BUCKETS[:-1])


@pytest.mark.parametrize("depth", [2, 0], ids=["first", "known"])
async def test_a_trainer_that_falls_silent_is_given_up_at_the_deadline_and_the_engine_lives(
    depth: int,
) -> None:
    async with pair() as both:
        both.train(1)
        if not depth:
            await both.tell(order("t1", depth=2))
            await both.send()
            assert (await both.report())["ok"]
        await both.tell(order("t2", depth=depth, timeout_s=0.5))
        said = await both.report()
        assert (said["transaction"], said["ok"]) == ("t2", False)
        assert "not all weights came within 0.5 s" in said["message"]
        await both.tell(order("t3", depth=2, group="another"))
        assert "is not known here" in (await both.report())["message"], "it takes the next order"


@pytest.mark.parametrize(("hangs_in", "where"), [("loader", "in load_weights"), ("forming", "in _take")])
async def test_a_process_that_nothing_gets_out_of_a_call_ends_with_nobody_there_to_kill_it(
    hangs_in: str, where: str
) -> None:
    async with pair(hangs_in=hangs_in) as both:
        both.train(1)
        await both.tell(order("t1", depth=2, timeout_s=0.5))
        if hangs_in == "loader":
            with contextlib.suppress(Unavailable):  # its process ends meanwhile
                await both.send()
        status, words = await both.end()
        assert status == 1
        assert where in words, "it says where it was"
