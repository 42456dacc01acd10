"""Conformance: weight updates by every transport, their refusals, and groups that break."""

from __future__ import annotations

import asyncio
import json
import uuid
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

GROUP_TIMEOUT_S = 60.0


# ---- a trainer: rank 0 of a two-member gloo group ----------------------------------------------------------


class Trainer:
    """Rank 0, as a trainer for SGLang would build it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.group = None
        self.store = dist.TCPStore(
            "127.0.0.1",
            0,
            2,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        self.port = self.store.port

    def _join(self) -> None:
        self.group, _ = c10d._new_process_group_helper(
            2,
            0,
            [],
            "gloo",
            c10d.PrefixStore(self.name, self.store),
            group_name=self.name,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        c10d._world.pg_group_ranks[self.group] = {0: 0, 1: 1}

    async def join(self) -> None:
        await asyncio.to_thread(self._join)

    @property
    def body(self):
        return {
            "master_address": "127.0.0.1",
            "master_port": self.port,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": self.name,
            "backend": "gloo",
        }

    def broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self.group)

    def leave(self) -> None:
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None


@contextmanager
def shared_memory(tensors):
    """A file in /dev/shm that holds the tensors back to back, and its descriptor."""
    path = Path("/dev/shm") / f"milepost-test-{uuid.uuid4().hex}"
    entries, offset = [], 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            data = _bytes(tensor)
            file.write(data)
            entries.append(
                {
                    "name": name,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "shape": list(tensor.shape),
                    "offset_bytes": offset,
                }
            )
            offset += len(data)
    try:
        yield {"kind": "shm", "path": str(path), "size_bytes": offset, "tensors": entries}
    finally:
        path.unlink()


def _bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _header(state):
    return {
        "names": list(state),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in state.values()],
        "shapes": [list(tensor.shape) for tensor in state.values()],
    }


def _only_ours(client, reason):
    if not client.engine.ours:
        pytest.skip(reason)


GLOO = "SGLang serves from GPUs, whose update groups are NCCL"
SHM = "SGLang reads pickled CUDA IPC handles here, not a shared-memory descriptor"


async def send_disk(client, state, tmp_path, reference, **options):
    """Writes a checkpoint folder and has the engine load it."""
    reference.load(state)
    folder = tmp_path / uuid.uuid4().hex
    await asyncio.to_thread(reference.model.save_pretrained, folder)
    return await client.post(
        "/update_weights_from_disk", {"model_path": str(folder), "flush_cache": False, **options}
    )


async def send_shm(client, state, **options):
    """Hands a bucket over through shared memory."""
    with shared_memory(state) as descriptor:
        return await client.post(
            "/update_weights_from_tensor",
            {
                "serialized_named_tensors": [json.dumps(descriptor)],
                "load_format": "flattened_bucket",
                "flush_cache": False,
                **options,
            },
        )


async def send_gloo(client, state, *, flattened, buckets=1, **options):
    """Broadcasts in a fresh group."""
    trainer = Trainer(f"run/{uuid.uuid4().hex}")
    _, reply = await asyncio.gather(trainer.join(), client.post("/init_weights_update_group", trainer.body))
    assert reply["success"] is True
    names = list(state)
    for part in range(buckets):
        chosen = {name: state[name] for name in names[part::buckets]}
        body = {**_header(chosen), "group_name": trainer.name, "flush_cache": False, **options}
        if flattened:
            body["load_format"] = "flattened_bucket"
            data = b"".join(_bytes(tensor) for tensor in chosen.values())
            sent = [torch.frombuffer(bytearray(data), dtype=torch.uint8)]
        else:
            sent = list(chosen.values())
        call = asyncio.create_task(client.post("/update_weights_from_distributed", body))
        for tensor in sent:
            await asyncio.to_thread(trainer.broadcast, tensor)
        assert (await call)["success"] is True
    await client.post("/destroy_weights_update_group", {"group_name": trainer.name})
    trainer.leave()


async def _logprobs_match(client, reference, prompt):
    reply = await client.generate(prompt, max_new_tokens=16, temperature=1.0, ignore_eos=True)
    got = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    expected = reference.logprobs(prompt, reply["output_ids"])
    return got == pytest.approx(expected, abs=client.engine.tolerance)


# ---- transports --------------------------------------------------------------------------------------------


async def test_disk(client, reference, ids, tmp_path, weights_put_back):
    new = reference.perturbed(1)
    async with client.updating():
        reply = await send_disk(client, new, tmp_path, reference)
    assert reply["success"] is True
    assert await _logprobs_match(client, reference, ids("1+1="))


async def test_shared_memory(client, reference, ids, weights_put_back):
    _only_ours(client, SHM)
    new = reference.perturbed(2)
    reference.load(new)
    async with client.updating():
        await send_shm(client, new)
    assert await _logprobs_match(client, reference, ids("1+1="))


@pytest.mark.parametrize("flattened, buckets", [(False, 1), (True, 1), (True, 3)])
async def test_gloo(client, reference, ids, weights_put_back, flattened, buckets):
    _only_ours(client, GLOO)
    new = reference.perturbed(3)
    reference.load(new)
    async with client.updating():
        await send_gloo(client, new, flattened=flattened, buckets=buckets)
    assert await _logprobs_match(client, reference, ids("1+1="))


async def test_all_transports_leave_the_same_bytes(client, reference, tmp_path, weights_put_back):
    """The checksum after each transport is that of the same weights loaded from disk."""
    _only_ours(client, GLOO)
    original = await client.checksum()
    new = reference.perturbed(4)
    async with client.updating():
        await send_disk(client, new, tmp_path, reference)
        by_disk = await client.checksum()
        await send_shm(client, reference.perturbed(5))
        assert await client.checksum() not in (by_disk, original)
        await send_shm(client, new)
        assert await client.checksum() == by_disk
        await send_shm(client, reference.perturbed(5))
        await send_gloo(client, new, flattened=True, buckets=2)
        assert await client.checksum() == by_disk
    assert by_disk != original


async def test_another_engine_on_the_same_folder_has_the_same_checksum(client, engine_pool):
    _only_ours(client, "SGLang's checksum depends on its layout; a second engine of it is not ours to start")
    async with engine_pool("0.5.19").client() as twin:
        assert await twin.checksum() == await client.checksum()


async def test_bfloat16_is_cast_into_a_float32_engine(client, reference, ids, weights_put_back):
    _only_ours(client, SHM)
    new = {name: tensor.bfloat16() for name, tensor in reference.perturbed(6).items()}
    reference.load({name: tensor.float() for name, tensor in new.items()})
    async with client.updating():
        await send_shm(client, new)
    assert await _logprobs_match(client, reference, ids("1+1="))


async def test_unaligned_tensors_in_a_bucket_are_read_right(client, reference, ids, weights_put_back):
    """An odd number of bfloat16 values before float32 ones puts those off their alignment."""
    _only_ours(client, SHM)
    new = reference.perturbed(7)
    odd = "model.layers.0.self_attn.q_norm.weight"
    await _send_with_odd_prefix(client, new, odd)
    reference.load(new)
    assert await _logprobs_match(client, reference, ids("1+1="))


async def _send_with_odd_prefix(client, state, first):
    path = Path("/dev/shm") / f"milepost-test-{uuid.uuid4().hex}"
    ordered = {first: state[first], **state}
    entries, blob = [], bytearray(b"\0")
    for name, tensor in ordered.items():
        entries.append(
            {"name": name, "dtype": "float32", "shape": list(tensor.shape), "offset_bytes": len(blob)}
        )
        blob += _bytes(tensor)
    path.write_bytes(blob)
    descriptor = {"kind": "shm", "path": str(path), "size_bytes": len(blob), "tensors": entries}
    try:
        async with client.updating():
            await client.post(
                "/update_weights_from_tensor",
                {"serialized_named_tensors": [json.dumps(descriptor)], "flush_cache": False},
            )
    finally:
        path.unlink()


async def test_a_tied_head_can_be_sent_under_either_name(client, reference, ids, weights_put_back):
    _only_ours(client, SHM)
    new = reference.perturbed(8)
    reference.load(new)
    under_head = {"lm_head.weight": new["model.embed_tokens.weight"]} | {
        name: tensor for name, tensor in new.items() if name != "model.embed_tokens.weight"
    }
    async with client.updating():
        await send_shm(client, under_head)
    assert await _logprobs_match(client, reference, ids("1+1="))


# ---- refusals: weights stay as they were -------------------------------------------------------------------

NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "name, tensor, named",
    [
        ("model.norm.wieght", torch.zeros(64), ["model.norm.wieght", NORM]),
        (NORM, torch.zeros(65), [NORM, "[65]", "[64]"]),
        (NORM, torch.zeros(8, 8), [NORM, "[8, 8]", "[64]"]),
        (NORM, torch.zeros(64, dtype=torch.int32), [NORM, "int32", "float32"]),
    ],
)
@pytest.mark.parametrize("transport", ["shm", "gloo", "disk"])
async def test_what_does_not_fit_is_refused_by_name(
    client, reference, tmp_path, name, tensor, named, transport
):
    _only_ours(client, "SGLang warns of unknown names, and dies of wrong shapes")
    before = await client.checksum()
    good = {"model.layers.0.input_layernorm.weight": torch.ones(64) * 7}
    async with client.updating():
        message = await _refused(client, good | {name: tensor}, tmp_path, reference, transport)
    assert all(part in message for part in named), message
    assert await client.checksum() == before


async def _refused(client, state, tmp_path, reference, transport):
    if transport == "disk":
        from safetensors.torch import save_file

        full = reference.state() | state
        save_file(full, tmp_path / "model.safetensors")
        body = {"model_path": str(tmp_path), "flush_cache": False}
        reply = await client.post("/update_weights_from_disk", body, status=400)
    elif transport == "shm":
        with shared_memory(state) as descriptor:
            body = {"serialized_named_tensors": [json.dumps(descriptor)], "flush_cache": False}
            reply = await client.post("/update_weights_from_tensor", body, status=400)
    else:
        trainer = Trainer(f"run/{uuid.uuid4().hex}")
        await asyncio.gather(trainer.join(), client.post("/init_weights_update_group", trainer.body))
        body = {**_header(state), "group_name": trainer.name, "flush_cache": False}
        reply = await client.post("/update_weights_from_distributed", body, status=400)
        await client.post("/destroy_weights_update_group", {"group_name": trainer.name})
        trainer.leave()
    assert reply["success"] is False
    return reply["message"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"path": "/etc/passwd"}, "path"),
        ({"path": "/dev/shm/../../etc/passwd"}, "path"),
        ({"path": "/dev/shm/nothing-of-this-name"}, "path"),
        ({"size_bytes": 1 << 40}, "size_bytes"),
        ({"size_bytes": 1}, "size_bytes"),
        ({"size_bytes": "all"}, "size_bytes"),
        ({"kind": "pickle"}, "kind"),
        ({"tensors": []}, "tensors"),
        (
            {"tensors": [{"name": NORM, "dtype": "float32", "shape": [64], "offset_bytes": -4}]},
            "offset_bytes",
        ),
        ({"tensors": [{"name": NORM, "dtype": "float31", "shape": [64], "offset_bytes": 0}]}, "float31"),
        ({"tensors": [{"name": NORM, "dtype": "float32", "shape": [-64], "offset_bytes": 0}]}, "shapes"),
    ],
)
async def test_bad_descriptors_are_refused(client, reference, change, named):
    _only_ours(client, SHM)
    before = await client.checksum()
    async with client.updating():
        with shared_memory({NORM: torch.zeros(64)}) as descriptor:
            body = {"serialized_named_tensors": [json.dumps(descriptor | change)], "flush_cache": False}
            reply = await client.post("/update_weights_from_tensor", body, status=400)
    assert named in reply["message"]
    assert await client.checksum() == before


async def test_pickles_and_links_are_not_read(client, tmp_path):
    _only_ours(client, SHM)
    link = Path("/dev/shm") / f"milepost-test-{uuid.uuid4().hex}"
    target = tmp_path / "secret"
    target.write_bytes(b"\0" * 256)
    link.symlink_to(target)
    entry = {"name": NORM, "dtype": "float32", "shape": [64], "offset_bytes": 0}
    linked = json.dumps({"kind": "shm", "path": str(link), "size_bytes": 256, "tensors": [entry]})
    try:
        async with client.updating():
            for payload in ("gASVBQAAAAAAAABLAS4=", linked):
                body = {"serialized_named_tensors": [payload], "flush_cache": False}
                assert (await client.post("/update_weights_from_tensor", body, status=400))[
                    "success"
                ] is False
    finally:
        link.unlink()


async def test_incomplete_or_missing_folders_are_refused(client, reference, tmp_path):
    _only_ours(client, "SGLang leaves tensors that a folder lacks as they were")
    from safetensors.torch import save_file

    before = await client.checksum()
    save_file({NORM: torch.zeros(64)}, tmp_path / "model.safetensors")
    async with client.updating():
        for path, named in ((tmp_path, "missing"), (tmp_path / "nowhere", "nowhere")):
            body = {"model_path": str(path), "flush_cache": False}
            assert named in (await client.post("/update_weights_from_disk", body, status=400))["message"]
        (tmp_path / "model.safetensors").write_bytes(b"rubbish")
        body = {"model_path": str(tmp_path), "flush_cache": False}
        assert "not readable" in (await client.post("/update_weights_from_disk", body, status=400))["message"]
    assert await client.checksum() == before


# ---- groups that break -------------------------------------------------------------------------------------


async def test_groups_are_named_and_refused_by_name(client):
    _only_ours(client, GLOO)
    body = {**_header({NORM: torch.zeros(64)}), "group_name": "nobody", "flush_cache": False}
    async with client.updating():
        assert (
            "nobody" in (await client.post("/update_weights_from_distributed", body, status=400))["message"]
        )
    gone = await client.post("/destroy_weights_update_group", {"group_name": "nobody"}, status=400)
    assert "nobody" in gone["message"]
    trainer = Trainer("run/refused")
    for change, named in (
        ({"backend": "nccl"}, "nccl"),
        ({"rank_offset": 0}, "rank_offset"),
        ({"rank_offset": 2}, "rank_offset"),
        ({"master_port": 0}, "master_port"),
        ({"group_name": ""}, "group_name"),
    ):
        reply = await client.post("/init_weights_update_group", trainer.body | change, status=400)
        assert named in reply["message"]


async def test_two_groups_can_be_open_at_once(client, reference, weights_put_back):
    _only_ours(client, GLOO)
    trainers = [Trainer(f"run/{uuid.uuid4().hex}") for _ in range(2)]
    for trainer in trainers:
        await asyncio.gather(trainer.join(), client.post("/init_weights_update_group", trainer.body))
    again = await client.post("/init_weights_update_group", trainers[0].body, status=400)
    assert "exists" in again["message"]
    async with client.updating():
        for trainer, value in zip(trainers, (2.0, 3.0), strict=True):
            tensor = torch.full((64,), value)
            body = {**_header({NORM: tensor}), "group_name": trainer.name, "flush_cache": False}
            call = asyncio.create_task(client.post("/update_weights_from_distributed", body))
            await asyncio.to_thread(trainer.broadcast, tensor)
            await call
            assert (
                await client.post("/get_weights_by_name", {"name": NORM, "truncate_size": 2}) == [value] * 2
            )
    for trainer in trainers:
        await client.post("/destroy_weights_update_group", {"group_name": trainer.name})
        trainer.leave()


async def test_destroying_a_group_ends_a_transfer_that_waits(client):
    """The trainer announces a bucket and never sends it."""
    _only_ours(client, GLOO)
    before = await client.checksum()
    trainer = Trainer(f"run/{uuid.uuid4().hex}")
    await asyncio.gather(trainer.join(), client.post("/init_weights_update_group", trainer.body))
    body = {**_header({NORM: torch.zeros(64)}), "group_name": trainer.name, "flush_cache": False}
    async with client.updating():
        call = asyncio.create_task(client.post("/update_weights_from_distributed", body, status=400))
        await asyncio.wait([call], timeout=0.2)
        assert not call.done()
        await client.post("/destroy_weights_update_group", {"group_name": trainer.name})
        assert "destroyed" in (await call)["message"]
    trainer.leave()
    assert await client.checksum() == before
    assert (await client.http.get("/health_generate")).status_code == 200


async def test_a_trainer_that_dies_in_mid_transfer_breaks_the_group_and_nothing_else(client):
    _only_ours(client, GLOO)
    before = await client.checksum()
    trainer = Trainer(f"run/{uuid.uuid4().hex}")
    await asyncio.gather(trainer.join(), client.post("/init_weights_update_group", trainer.body))
    state = {NORM: torch.zeros(64), "model.layers.0.input_layernorm.weight": torch.zeros(64)}
    body = {**_header(state), "group_name": trainer.name, "flush_cache": False}
    async with client.updating():
        call = asyncio.create_task(client.post("/update_weights_from_distributed", body, status=400))
        await asyncio.to_thread(trainer.broadcast, state[NORM])  # the first of two, and then no more
        trainer.leave()  # closes its sockets, as the death of its process would
        reply = await call
        assert reply["success"] is False
        again = await client.post("/update_weights_from_distributed", body, status=400)
        assert "not open" in again["message"]
    assert await client.checksum() == before
