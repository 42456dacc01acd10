"""The router's side of the ledger, over a WeightService that comes and goes and refuses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from launched import free_port
from milepost import errors
from milepost.v1 import weights_pb2 as pb
from milepost.v1 import weights_pb2_grpc
from milepost_common.server import GrpcServer
from milepost_router import ledger as ledger_module
from milepost_router.ledger import Ledger, Publication, RouterHeld
from milepost_router.version_string import LoadedVersion

DEADLINE_S = 60.0


class Weights(weights_pb2_grpc.WeightServiceServicer):
    """Versions in a dict; every rule that a test needs is a switch."""

    def __init__(self) -> None:
        self.versions: dict[int, pb.WeightVersion] = {}
        self.published = asyncio.Event()
        self.refusal: errors.MilepostError | None = None
        self.leases: list[tuple[str, int]] = []
        self.live_terms: set[int] = set()
        self.ttls_ms: list[int] = []
        self.held_by_another = False

    def put(self, version: int, label: int, state: Any, term: int = 1) -> None:
        self.versions[version] = pb.WeightVersion(version=version, label=label, state=state, term=term)

    async def ReserveVersion(self, request: Any, context: Any) -> Any:
        return pb.ReserveVersionResponse(version=request.at_least)

    async def PublishVersion(self, request: Any, context: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.put(request.version, request.label, pb.VERSION_STATE_PUBLISHED, request.term)
        self.versions[request.version].members.extend(request.members)
        self.published.set()
        return pb.PublishVersionResponse(version=self.versions[request.version])

    async def GetVersion(self, request: Any, context: Any) -> Any:
        known = [v for v in self.versions.values() if v.state == pb.VERSION_STATE_PUBLISHED]
        found = self.versions.get(request.version) if request.version else max(known, key=lambda v: v.version)
        if found is None:
            raise errors.NotFound("no such version")
        return pb.GetVersionResponse(version=found)

    async def LeaseRouter(self, request: Any, context: Any) -> Any:
        self.leases.append((request.router_id, request.router_term))
        self.ttls_ms.append(request.ttl.ToMilliseconds())
        unknown = request.router_term and request.router_term not in self.live_terms
        if self.held_by_another or unknown:
            raise errors.FailedPrecondition("somebody else", reason="ROUTER_HELD")
        term = request.router_term or len(self.leases)
        self.live_terms.add(term)
        return pb.LeaseRouterResponse(router_term=term)


@asynccontextmanager
async def serving(weights: Weights, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    async with GrpcServer(listen=listen, grace_s=0.0) as server:
        server.add(weights_pb2_grpc.add_WeightServiceServicer_to_server, weights, "milepost.v1.WeightService")
        await server.start()
        yield server.address


@asynccontextmanager
async def ledger_at(address: str, refused: list[tuple[str, int, str]] | None = None) -> AsyncIterator[Ledger]:
    said = refused if refused is not None else []
    ledger = Ledger(address, timeout_s=30.0, on_refused=lambda *what: said.append(what))
    try:
        yield ledger
    finally:
        await ledger.close()


def nobody() -> str:
    """An address at which somebody will listen later, or never."""
    return f"127.0.0.1:{free_port()}"


def publication(version: int = 1, label: int = 0) -> Publication:
    return Publication(
        run_id="run", term=1, version=version, label=label, members=("a",), allow_older_label=False
    )


async def test_a_version_is_published():
    weights = Weights()
    async with serving(weights) as address, ledger_at(address) as ledger:
        assert await ledger.reserve("run", term=1, step=0, attempt=1, at_least=5) == 5
        assert await ledger.publish(publication())
        assert weights.versions[1].members == ["a"]
        await ledger.check_published("run", 1, 0)
        with pytest.raises(
            errors.FailedPrecondition, match="label 0 in the ledger, not published with label 9"
        ):
            await ledger.check_published("run", 1, 9)


async def test_a_publication_is_repeated_until_the_ledger_is_back():
    weights = Weights()
    address = nobody()
    async with ledger_at(address) as ledger:
        assert not await ledger.publish(publication())
        async with serving(weights, address), asyncio.timeout(DEADLINE_S):
            await weights.published.wait()
        assert weights.versions[1].state == pb.VERSION_STATE_PUBLISHED


async def test_every_version_that_was_served_is_published_in_the_end():
    """Groups hold tokens of each of them, and can be sealed only then."""
    weights = Weights()
    address = nobody()
    async with ledger_at(address) as ledger:
        assert not await ledger.publish(publication(1, 0))
        assert not await ledger.publish(publication(2, 1))
        async with serving(weights, address), asyncio.timeout(DEADLINE_S):
            await ledger.publish(publication(3, 2))  # at once or later, as soon as it is connected again
            while len(weights.versions) < 3:
                weights.published.clear()
                await weights.published.wait()
        assert sorted(weights.versions) == [1, 2, 3]


async def test_a_publication_that_is_refused_later_is_reported():
    weights = Weights()
    refused: list[tuple[str, int, str]] = []
    address = nobody()
    async with ledger_at(address, refused) as ledger:
        assert not await ledger.publish(publication())
        weights.refusal = errors.StaleTerm("term 1 is over")
        async with serving(weights, address), asyncio.timeout(DEADLINE_S):
            while not refused:  # noqa: ASYNC110 (the callback is synchronous)
                await asyncio.sleep(0.01)
    assert refused == [("run", 1, "term 1 is over")]


async def test_a_refusal_at_once_is_an_error():
    weights = Weights()
    weights.refusal = errors.FailedPrecondition("void")
    async with serving(weights) as address, ledger_at(address) as ledger:
        with pytest.raises(errors.FailedPrecondition, match="void"):
            await ledger.publish(publication())


@pytest.mark.parametrize(
    ("loaded", "why_not"),
    [
        (LoadedVersion("run", 2, 1), ""),
        (LoadedVersion("run", 3, 2), ""),
        (LoadedVersion("run", 1, 0), "not the newest"),
        (LoadedVersion("run", 2, 9), "has label 1"),
        (LoadedVersion("run", 4, 3), "given up"),
        (LoadedVersion("run", 7, 0), "knows no version 7"),
    ],
)
async def test_weights_are_judged_by_the_ledger(loaded, why_not):
    weights = Weights()
    weights.put(1, 0, pb.VERSION_STATE_PUBLISHED)
    weights.put(2, 1, pb.VERSION_STATE_PUBLISHED)
    if loaded.version == 3:
        weights.put(3, 2, pb.VERSION_STATE_RESERVED, term=8)
    weights.put(4, 3, pb.VERSION_STATE_VOID)
    async with serving(weights) as address, ledger_at(address) as ledger:
        answer = await ledger.judge(loaded, ("a", "b"))
    assert why_not in answer
    assert bool(answer) == bool(why_not)
    if loaded.version == 3:
        assert weights.versions[3].state == pb.VERSION_STATE_PUBLISHED, "the commit is finished"
        assert (weights.versions[3].term, weights.versions[3].members) == (8, ["a", "b"])


async def test_a_reserved_version_of_a_fenced_term_is_not_served():
    weights = Weights()
    weights.put(1, 0, pb.VERSION_STATE_RESERVED)
    weights.refusal = errors.StaleTerm("term 1 is over")
    async with serving(weights) as address, ledger_at(address) as ledger:
        assert "term 1 is over" in await ledger.judge(LoadedVersion("run", 1, 0), ("a",))


async def test_nothing_is_proven_while_the_ledger_is_away():
    async with ledger_at(nobody()) as ledger:
        assert "while the ledger is away" in await ledger.judge(LoadedVersion("run", 1, 0), ("a",))


async def test_a_run_is_leased_renewed_and_claimed_again_where_the_lease_ran_out():
    weights = Weights()
    async with serving(weights) as address, ledger_at(address) as ledger:
        await ledger.lease("run")
        await ledger.lease("run")
        assert [term for _, term in weights.leases] == [0, 1]
        weights.live_terms.clear()
        await ledger.lease("run")
        assert [term for _, term in weights.leases[2:]] == [1, 0]
        weights.held_by_another = True
        with pytest.raises(RouterHeld, match="somebody else"):
            await ledger.lease("run")
        assert len({name for name, _ in weights.leases}) == 1


async def test_a_router_that_stops_gives_its_runs_back(monkeypatch):
    monkeypatch.setattr(ledger_module, "_RELEASE_S", DEADLINE_S)
    weights = Weights()
    async with serving(weights) as address:
        async with ledger_at(address) as ledger:
            await ledger.lease("run")
        assert weights.ttls_ms == [6000, 1]
