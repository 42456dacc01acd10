"""Bad input meets real services: messages name the field, the value and the remedy, and nothing is lost.

One stack without a trainer serves most cases; the tests act as its trainer, its prompt clients and, in runs
of their own, as gateways. Judges: the message as a user reads it, the ledger's audit, the engine's checksum.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from safetensors.numpy import load_file, save_file

from milepost import BufferClient, RouterClient, WeightClient, errors
from milepost import types as t
from milepost.convert import make_group
from stack import MILEPOST, READY_S, Stack, until

CONTEXT = 64
REWARD_TIMEOUT_S = 4.0  # more than a busy machine takes for a reward that does nothing
REWARDS = """
import time


def picky(sample):
    if sample.label == "raise":
        raise ValueError("cannot read this")
    while sample.label == "hang" and not sample.index:
        time.sleep(0.01)
    return float(sample.index)
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


# ---- what the tests stand on -------------------------------------------------------------------------------


def cli(*args: str | Path, cwd: Path | None = None, timeout_s: float = 150.0) -> tuple[int, str]:
    """Runs `milepost ARGS` to its end; returns its exit status and all that it said, on one line."""
    command = [MILEPOST, *map(str, args)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, cwd=cwd
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.returncode, " ".join(done.stdout.split())


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port of this machine where nobody listens, and nobody can as long as the block takes."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Clients of a stack, and the publisher's place in one run of it."""

    stack: Stack
    run_id: str
    buffer: BufferClient
    weights: WeightClient
    router: RouterClient
    term: int = 0

    async def put(self, *prompts: t.Prompt) -> None:
        """Puts prompts, all of which are accepted."""
        items = [t.PromptItem(prompt=p) for p in prompts]
        result = await self.buffer.put_prompts(self.run_id, items=items, max_wait_s=60)
        assert result.accepted == len(prompts), result

    async def rows(self) -> dict[str, t.LedgerRow]:
        """The ledger by prompt."""
        return {row.prompt_id: row async for row in self.buffer.get_ledger(self.run_id)}

    async def settled(self, *prompt_ids: str) -> dict[str, t.LedgerRow]:
        """Waits until these prompts are ready or dropped."""
        ends = (t.PromptState.READY, t.PromptState.DROPPED)

        async def check() -> dict[str, t.LedgerRow] | None:
            rows = await self.rows()
            return rows if all(p in rows and rows[p].state in ends for p in prompt_ids) else None

        return await until(f"{prompt_ids} are settled\n{self.stack.logs()}", check, within_s=READY_S)

    async def audit_closes(self) -> None:
        """Nothing is lost, nothing is there twice."""
        audit = await self.buffer.audit_ledger(self.run_id)
        assert (audit.problems, audit.lost, audit.twice) == ((), 0, 0)
        assert audit.accepted == audit.trained + sum(audit.dropped.values()) + audit.in_flight

    async def prepare(self, tensors: dict[str, np.ndarray[Any, Any]], *, label: int) -> t.Prepared:
        """Opens a weight transaction for these tensors."""
        manifest = tuple(spec(name, value) for name, value in tensors.items())
        attempt = uuid.uuid4().int >> 100
        request = t.PrepareRequest(
            run_id=self.run_id,
            term=self.term,
            label=label,
            attempt=attempt,
            manifest=manifest,
            transport=t.Transport.DISK,
            timeout_s=120.0,
        )
        return await self.router.prepare_weights(request)

    async def send(
        self, prepared: t.Prepared, tensors: dict[str, np.ndarray[Any, Any]], folder: Path
    ) -> t.BucketAck:
        """Sends them as one bucket over the disk."""
        await asyncio.to_thread(save_model, tensors, folder)

        async def headers() -> AsyncIterator[t.BucketHeader]:
            yield t.BucketHeader(
                transaction_id=prepared.transaction_id,
                fleet_epoch=prepared.fleet_epoch,
                bucket_index=0,
                tensors=tuple(spec(name, value) for name, value in tensors.items()),
                handles=(t.HandlesOfEngine(handles=(str(folder).encode(),)),),
                size_bytes=sum(value.nbytes for value in tensors.values()),
            )

        (ack,) = [a async for a in self.router.update_weights(headers(), timeout_s=120.0)]
        return ack

    async def commit(self, prepared: t.Prepared, *, epoch_off_by: int = 0) -> t.Committed:
        """Publishes a transaction of one bucket."""
        return await self.router.commit_weights(
            prepared.transaction_id,
            fleet_epoch=prepared.fleet_epoch + epoch_off_by,
            term=self.term,
            num_buckets=1,
        )

    async def checksum(self) -> str:
        """Of the weights that the stack's engine holds."""
        url = f"http://{self.stack.address('engine-0', 'http')}/weights_checker"
        async with (
            aiohttp.ClientSession() as session,
            session.post(url, json={"action": "checksum"}) as reply,
        ):
            return (await reply.json())["ranks"][0]["per_gpu_checksum"]


def save_model(tensors: dict[str, np.ndarray[Any, Any]], folder: Path) -> None:
    """Writes a folder that an engine can load."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")


def spec(name: str, value: np.ndarray[Any, Any]) -> t.TensorSpec:
    """A manifest entry."""
    return t.TensorSpec(name=name, dtype=value.dtype.name, shape=value.shape)


@asynccontextmanager
async def learner_of(stack: Stack, run_id: str, *, term: int = 0) -> AsyncIterator[Learner]:
    """Clients of a stack."""
    async with AsyncExitStack() as opened:
        yield Learner(
            stack=stack,
            run_id=run_id,
            buffer=await opened.enter_async_context(BufferClient(stack.address("buffer"))),
            weights=await opened.enter_async_context(WeightClient(stack.address("buffer"))),
            router=await opened.enter_async_context(RouterClient(stack.address("router"))),
            term=term,
        )


async def take_term(buffer: BufferClient, run_id: str) -> int:
    """Becomes the run's publisher, from the start."""
    term = (await buffer.resume_consumer(run_id)).term
    await buffer.resume_consumer(run_id, term=term, checkpoint_step=0)
    return term


CONFIG = t.RunConfig(
    groups_per_step=16,
    samples_per_prompt=2,
    max_attempts=2,
    lease_ttl_s=120.0,
    reward="my_rewards:picky",
    sampling=t.SamplingParams(max_new_tokens=5),
)


async def bring_up(stack: Stack, model: Path, folder: Path) -> int:
    """Makes the stack's run and publishes its first weights; returns the term."""
    for name in ("buffer", "router", "engine-0", "rollout"):
        await stack.ready(name)
    async with learner_of(stack, stack.run_id) as one:
        await one.buffer.create_run(stack.run_id, config=CONFIG)
        term = await take_term(one.buffer, stack.run_id)
        one = Learner(**{**vars(one), "term": term})

        async def joined() -> bool:
            engines = (await one.router.list_engines(stack.run_id)).engines
            return [e.state for e in engines] == [t.EngineState.STALE]

        await until("the engine waits for weights", joined, within_s=READY_S)
        tensors = load_file(model / "model.safetensors")
        prepared = await one.prepare(tensors, label=0)
        ack = await one.send(prepared, tensors, folder / "first")
        assert [a.ok for a in ack.acks] == [True], ack
        assert (await one.commit(prepared)).published
    return term


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[tuple[Stack, int]]:
    """A stack with one engine and no trainer, its first weights served; and the publisher's term."""
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "my_rewards.py").write_text(REWARDS)
    stack = Stack.launch(
        folder / "badinput",
        model,
        "--no-trainer",
        up={"engines": 1},
        engine={"context_length": CONTEXT},
        rollout={"reward_path": [str(folder)], "reward_timeout_s": REWARD_TIMEOUT_S},
    )
    try:
        yield stack, asyncio.run(bring_up(stack, model, folder))
    finally:
        assert stack.stop() == 130


@pytest.fixture
async def learner(running: tuple[Stack, int]) -> AsyncIterator[Learner]:
    """The publisher of the stack's run."""
    stack, term = running
    async with learner_of(stack, stack.run_id, term=term) as found:
        yield found


@pytest.fixture
async def by_hand(running: tuple[Stack, int]) -> AsyncIterator[Learner]:
    """The publisher of a run that no gateway works for: leases end at once, version 1 is published."""
    stack, _ = running
    async with learner_of(stack, f"hand-{uuid.uuid4().hex[:8]}") as one:
        config = t.RunConfig(groups_per_step=2, samples_per_prompt=2, lease_ttl_s=0.2)
        await one.buffer.create_run(one.run_id, config=config)
        term = await take_term(one.buffer, one.run_id)
        version = await one.weights.reserve_version(one.run_id, term=term, step=0, attempt=1)
        await one.weights.publish_version(one.run_id, term=term, version=version, label=0, members=["e"])
        yield Learner(**{**vars(one), "term": term})


async def lease_one(one: Learner, gateway: str) -> t.PromptLease:
    """Leases a prompt, waiting for it."""
    found = await one.buffer.lease_prompts(
        one.run_id, gateway_id=gateway, instance_id=gateway, max_prompts=1, max_wait_s=60
    )
    (lease,) = found.leases
    return lease


def group_of(lease: t.PromptLease, *, size: int = 2) -> t.Group:
    """A group of that many samples."""
    span = t.VersionSpan(start=0, end=4, weight_version=lease.min_version)
    samples = [
        t.Sample(
            index=i,
            tokens=np.arange(4, dtype=np.int32),
            loss_mask=np.ones(4, np.uint8),
            logprobs=np.full(4, -0.5, np.float32),
            version_spans=(span,),
            outcome=t.Outcome.COMPLETED,
            reward=float(i),
        )
        for i in range(size)
    ]
    return make_group(lease.prompt, attempt=lease.attempt, samples=samples)


# ---- the command line and settings -------------------------------------------------------------------------


BASE = '[run]\nrun_id = "x"\n[trainer]\nmodel_dir = "{model}"\n'


@pytest.mark.parametrize(
    ("text", "flags", "named"),
    [
        (BASE + "[run.sampling]\ntop_q = 1\n", (), "run.sampling.top_q = 1; did you mean top_"),
        (BASE.replace("run_id", "group_per_step = 4\nrun_id"), (), "run.group_per_step = 4; did you mean"),
        (BASE + '[rollout]\ntokeniser = "t"\n', (), "rollout.tokeniser = 't'; did you mean tokenizer"),
        (BASE + "[rolout]\n", (), "unknown table [rolout]; did you mean rollout"),
        (BASE.replace('"x"', '"a b"'), (), "run.run_id = 'a b'"),
        (BASE + "[up]\nengines = 'many'\n", (), "up.engines = 'many': Input should be a valid integer"),
        (BASE.replace('"x"', '"x"\nreward = "exackt"'), (), "run.reward = 'exackt': Value error, use exact"),
        (BASE.replace("{model}", "gone"), (), "trainer.model_dir = 'gone': there is no such folder; name a"),
        (BASE, ("--feed", "none.jsonl"), "up.feed = 'none.jsonl': no such file; give a JSONL file"),
        (BASE, ("--enginse", "2"), "did you mean --engines"),
        ("[run\n", (), "not TOML"),
    ],
)  # fmt: skip
def test_settings_are_refused_by_name_before_anything_starts(
    tmp_path: Path, model: Path, text: str, flags: Sequence[str], named: str
) -> None:
    (tmp_path / "milepost.toml").write_text(text.format(model=model))
    status, said = cli("up", "--ports", "free", *flags, cwd=tmp_path)
    assert (status, named in said) == (2, True), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "status", "named"),
    [
        (("feed", "none.jsonl"), 1, "none.jsonl: No such file or directory"),
        (("feed", "."), 1, ".: Is a directory"),
        (("rollout", "none.jsonl", "--standalone"), 1, "none.jsonl: No such file or directory"),
        (("feed", "ok.jsonl", "--run", "a b"), 2, "--run: 'a b': no run is called so; use 1 to 128 of"),
        (("feed", "ok.jsonl", "--buffer", "nowhere"), 2, "--buffer = 'nowhere': no address; give host:port"),
        (("rollout", "ok.jsonl", "--rollout", "h:99999"), 2, "--rollout = 'h:99999': no address; give"),
        (("buffer", "serve", "--listen", "127.0.0.1:99999"), 2, "listen = '127.0.0.1:99999': no address"),
        (
            ("rollout", "serve", "--tokenizer", "gone", "--buffer", ""),
            2,
            "rollout.tokenizer 'gone': there is",
        ),
        (("rollout", "serve", "--router_http", "nowhere"), 2, "rollout.router_http = 'nowhere'"),
    ],
)
def test_command_lines_are_refused_by_name(
    tmp_path: Path, args: Sequence[str], status: int, named: str
) -> None:
    (tmp_path / "ok.jsonl").write_text('{"prompt": "1+1="}\n')
    got, said = cli(*args, cwd=tmp_path)
    assert (got, named in said) == (status, True), said


def test_redis_down_at_the_start(tmp_path: Path) -> None:
    with deaf_port() as port:
        url = f"redis://127.0.0.1:{port}"
        args = ("buffer", "serve", "--listen", "127.0.0.1:0", "--redis_url", url, "--redis_wait_s", "0.2")
        status, said = cli(*args, cwd=tmp_path)
    assert status == 1
    assert f"redis_url = {url}: no answer within redis_wait_s = 0.2" in said
    assert "start Redis, correct redis_url, or leave redis_url empty" in said


async def test_a_port_that_is_taken_and_a_folder_that_has_an_owner(learner: Learner, tmp_path: Path) -> None:
    taken = learner.stack.address("buffer")
    status, said = await asyncio.to_thread(cli, "buffer", "serve", "--listen", taken, cwd=tmp_path)
    assert status == 1
    assert f"listen = {taken}: cannot bind; is the port taken? choose another one" in said
    config = learner.stack.run_dir / "milepost.toml"
    status, said = await asyncio.to_thread(cli, "up", "--config", config, "--no-trainer", cwd=tmp_path)
    assert status == 1
    assert f"run_dir = {learner.stack.run_dir}: another `milepost up` owns it; stop that one" in said
    assert (await learner.buffer.get_run(learner.run_id)).run_id == learner.run_id


async def test_an_unknown_run(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "ok.jsonl").write_text('{"prompt": "1+1="}\n')
    where = ("--run", "nosuch", "--buffer", learner.buffer.address)
    named = "run_id = nosuch: no such run; the trainer creates it with CreateRun"
    for args in (("ledger",), ("feed", tmp_path / "ok.jsonl", "--wait-s", "0.2")):
        status, said = await asyncio.to_thread(cli, *args, *where)
        assert (status, named in said) == (1, True), said
    with pytest.raises(errors.NotFound, match="run_id = nosuch: no such run"):
        await learner.buffer.lease_step("nosuch", term=1, step=1)
    assert "nosuch" not in {r.run_id for r in await learner.buffer.get_stats()}


async def test_a_run_that_exists_with_other_settings(learner: Learner) -> None:
    other = t.RunConfig(**{**vars(CONFIG), "groups_per_step": 8, "reward": "exact"})
    with pytest.raises(errors.AlreadyExists) as caught:
        await learner.buffer.create_run(learner.run_id, config=other)
    said = str(caught.value)
    assert "groups_per_step = 16 (asked for 8), reward = 'my_rewards:picky' (asked for 'exact')" in said
    assert "choose another run_id" in said
    assert (await learner.buffer.get_run(learner.run_id)).config.groups_per_step == 16


# ---- prompts, rewards, groups ------------------------------------------------------------------------------


async def test_lines_that_cannot_be_used_are_numbered_and_the_rest_is_rolled_out(
    learner: Learner, tmp_path: Path
) -> None:
    lines = ['{"prompt": "10+11="}', "rubbish", '{"promt": "x"}', '{"prompt": "12+13="}']
    lines += ['{"prompt": "1+1=", "sampling": {"top_p": 7}}', '{"prompt": "14+15="}']
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    where = ("--run", learner.run_id, "--buffer", learner.buffer.address, "--keep-open")
    status, said = await asyncio.to_thread(cli, "feed", "lines.jsonl", *where, cwd=tmp_path)
    assert status == 1
    assert re.search(r"line 2: the line is 'rubbish', wanted one JSON object .* at column 1", said), said
    assert "line 3: promt is 'x'" in said
    assert "did you mean 'prompt'?; skipped" in said
    assert "line 5: sampling.top_p is '7', wanted a number above 0, at most 1; change it" in said
    assert "fed 3 prompts (0 were there already), 3 lines skipped" in said
    rows = await learner.settled("lines/0/0", "lines/0/3", "lines/0/5")
    mine = {name: row.state for name, row in rows.items() if name.startswith("lines/")}
    assert mine == dict.fromkeys(("lines/0/0", "lines/0/3", "lines/0/5"), t.PromptState.READY)
    await learner.audit_closes()


async def test_a_prompt_that_is_longer_than_the_context(learner: Learner) -> None:
    await learner.put(t.Prompt(prompt_id="long", text="1" * 100), t.Prompt(prompt_id="short", text="1+1="))
    rows = await learner.settled("long", "short")
    assert (rows["long"].state, rows["long"].drop_reason) == (t.PromptState.DROPPED, t.DropReason.INVALID)
    assert f"100 tokens leave no room in the engines' context of {CONTEXT} tokens" in rows["long"].detail
    assert "shorten it, or use a model with a longer context" in rows["long"].detail
    assert rows["short"].state is t.PromptState.READY
    await learner.audit_closes()


async def test_rewards_that_raise_hang_or_are_not_there(learner: Learner) -> None:
    text = "10+25="
    await learner.put(
        t.Prompt(prompt_id="raise", text=text, label="raise"),
        t.Prompt(prompt_id="hang", text=text, label="hang"),
        t.Prompt(prompt_id="typo", text=text, reward="exackt"),
        t.Prompt(prompt_id="gone", text=text, reward="not_there:score"),
        t.Prompt(prompt_id="good", text=text),
    )
    rows = await learner.settled("raise", "hang", "typo", "gone", "good")
    assert rows["good"].state is t.PromptState.READY
    for name in ("raise", "hang"):
        assert rows[name].drop_reason is t.DropReason.REWARD_ERROR, rows[name]
        assert rows[name].failed_attempts == 2
        assert f"reward 'my_rewards:picky', prompt '{name}': " in rows[name].detail
    assert "raised ValueError: cannot read this" in rows["raise"].detail
    assert f"no answer within {REWARD_TIMEOUT_S:g} s (rollout.reward_timeout_s)" in rows["hang"].detail
    assert rows["typo"].state is rows["gone"].state is t.PromptState.DROPPED
    assert "reward 'exackt' is not known; did you mean 'exact'?" in rows["typo"].detail
    assert "reward 'not_there:score': there is no module 'not_there'" in rows["gone"].detail
    assert "rollout.reward_path" in rows["gone"].detail
    await learner.audit_closes()


async def test_a_group_of_the_wrong_size(by_hand: Learner) -> None:
    await by_hand.put(t.Prompt(prompt_id="p", text="1+1="))
    lease = await lease_one(by_hand, "a")
    (refused,) = await by_hand.buffer.put_groups(by_hand.run_id, groups=[group_of(lease, size=1)])
    assert refused.status is t.SealStatus.INVALID
    assert re.search(r"num_tokens.*\b1\b.*\b2\b", refused.message), refused.message
    assert "samples_per_prompt" in refused.message
    await by_hand.audit_closes()
    (sealed,) = await by_hand.buffer.put_groups(by_hand.run_id, groups=[group_of(lease)])
    assert sealed.status is t.SealStatus.SEALED
    await by_hand.audit_closes()


async def test_an_expired_lease(by_hand: Learner) -> None:
    await by_hand.put(t.Prompt(prompt_id="p", text="1+1="))
    late = await lease_one(by_hand, "late")
    taken = await lease_one(by_hand, "next")  # waits until the first lease is over
    assert (late.attempt + 1, late.prompt.prompt_id) == (taken.attempt, taken.prompt.prompt_id)
    (refused,) = await by_hand.buffer.put_groups(by_hand.run_id, groups=[group_of(late)])
    assert refused.status is t.SealStatus.LEASE_LOST
    assert re.search(rf"attempt\D*{late.attempt}\b.*\b{taken.attempt}\b", refused.message), refused.message
    (sealed,) = await by_hand.buffer.put_groups(by_hand.run_id, groups=[group_of(taken)])
    assert sealed.status is t.SealStatus.SEALED
    rows = await by_hand.rows()
    assert [(r.prompt_id, r.state) for r in rows.values()] == [("p", t.PromptState.READY)]
    await by_hand.audit_closes()


async def test_a_term_that_is_over(by_hand: Learner) -> None:
    newer = await take_term(by_hand.buffer, by_hand.run_id)
    with pytest.raises(errors.StaleTerm, match=rf"term = {by_hand.term}: {newer} is in force.*stop"):
        await by_hand.buffer.lease_step(by_hand.run_id, term=by_hand.term, step=1)
    await by_hand.audit_closes()


# ---- weights -----------------------------------------------------------------------------------------------


def misshapen(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"model.norm.weight": tensors["model.norm.weight"][:-1].copy()}


def of_whole_numbers(tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.int32)}


@pytest.mark.parametrize(
    ("spoil", "named"),
    [(misshapen, (r"\[63\]|\(63,\)", r"\[64\]|\(64,\)")), (of_whole_numbers, ("int32", "float"))],
)
async def test_an_update_of_the_wrong_shape_or_dtype(
    learner: Learner, model: Path, tmp_path: Path, spoil: Any, named: Sequence[str]
) -> None:
    before = await learner.checksum()
    version = (await learner.weights.get_version(learner.run_id)).version
    tensors = {k: v + np.float32(1) for k, v in load_file(model / "model.safetensors").items()}
    bad = spoil(tensors)
    prepared = await learner.prepare(bad, label=1)
    (answer,) = (await learner.send(prepared, bad, tmp_path / "bad")).acks
    assert not answer.ok
    assert all(re.search(x, answer.message) for x in ("model.norm.weight", *named)), answer.message
    with pytest.raises(errors.FailedPrecondition, match="was aborted: no member is left"):
        await learner.commit(prepared)
    assert await learner.checksum() == before
    assert (await learner.weights.get_version(learner.run_id)).version == version
    prompt_id = f"after-{spoil.__name__}"
    await learner.put(t.Prompt(prompt_id=prompt_id, text="1+1="))
    assert (await learner.settled(prompt_id))[prompt_id].state is t.PromptState.READY
    await learner.audit_closes()


async def test_a_stale_epoch(learner: Learner, model: Path, tmp_path: Path) -> None:
    before = await learner.checksum()
    tensors = {k: v + np.float32(1) for k, v in load_file(model / "model.safetensors").items()}
    prepared = await learner.prepare(tensors, label=1)
    with pytest.raises(errors.StaleEpoch) as caught:
        await learner.commit(prepared, epoch_off_by=1)
    said = str(caught.value)
    assert f"{prepared.fleet_epoch + 1}" in said
    assert f"{prepared.fleet_epoch}" in said
    assert "prepare again" in said
    await learner.router.abort_weights(prepared.transaction_id, term=learner.term, reason="test")
    assert await learner.checksum() == before
    await learner.put(t.Prompt(prompt_id="after-epoch", text="1+1="))
    assert (await learner.settled("after-epoch"))["after-epoch"].state is t.PromptState.READY


# ---- an engine that answers rubbish ------------------------------------------------------------------------


@asynccontextmanager
async def engine_of_rubbish() -> AsyncIterator[str]:
    """An engine that is right about prompts of one token, and talks rubbish about all others."""

    async def generate(request: web.Request) -> web.Response:
        ids = (await request.json())["input_ids"]
        meta = {
            "finish_reason": {"type": "stop", "matched": 1},
            "output_token_logprobs": [[-0.5, 4, None], [-0.25, 5, None]],
            "weight_version": "default",
        }
        tokens: Any = [4, 5] if len(ids) == 1 else ["four", 5]
        return web.json_response({"output_ids": tokens, "meta_info": meta, "text": ""})

    async def about(_: web.Request) -> web.Response:
        facts = {"version": "0.5.17", "context_length": CONTEXT, "weight_version": "default"}
        return web.json_response(facts)

    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_get("/{path:.*}", about)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_an_engine_that_answers_rubbish(model: Path, tmp_path: Path) -> None:
    prompts = [{"prompt_id": f"p{i}", "input_ids": [3] * (1 + i % 2)} for i in range(6)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    args = ("rollout", "in.jsonl", "--out", "out.jsonl", "--standalone", "--samples", "2")
    async with engine_of_rubbish() as url:
        with deaf_port() as nobody:
            where = ("--engine", url, "--tokenizer", model, "--rollout", f"127.0.0.1:{nobody}")
            status, said = await asyncio.to_thread(cli, *args, *where, "--max-new-tokens", "5", cwd=tmp_path)
    assert status == 1, said
    assert "12 samples (6 completed, 6 engine_error)" in said
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted({(r["prompt_id"], r["outcome"]) for r in rows}) == [
        (f"p{i}", "engine_error" if i % 2 else "completed") for i in range(6)
    ]
    for row in rows:
        if row["outcome"] == "engine_error":
            assert "output_ids is ['four', 5], wanted" in row["error"], row
            assert row["reward"] is None
        else:
            assert row["tokens"][row["prompt_length"] :] == [4, 5]
