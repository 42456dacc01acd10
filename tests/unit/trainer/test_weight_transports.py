"""Transports without engines: what they leave where, and that it is gone afterwards."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing import reductions

from milepost.errors import FailedPrecondition, Unavailable
from milepost.types import HandlesOfEngine, Prepared, TensorSpec, WeightMember
from milepost_trainer.buckets import Bucket, plan_buckets, read_bucket
from milepost_trainer.settings import PublishSettings
from milepost_trainer.transports import cuda_ipc
from milepost_trainer.transports.build import build_transport
from milepost_trainer.transports.disk import DiskTransport
from milepost_trainer.transports.gloo import GlooTransport
from milepost_trainer.transports.shm import ShmTransport

(BUCKET,) = plan_buckets([("a", "float32", (2, 2)), ("b", "bfloat16", (3,))], bucket_bytes=100)
FLAT = torch.arange(BUCKET.size_bytes, dtype=torch.uint8)


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def content(path: str) -> bytes:
    return Path(path).read_bytes()


async def test_shm_leaves_a_descriptor_and_nothing_afterwards(tmp_path: Path) -> None:
    dead = tmp_path / "milepost.999999999.1"
    dead.write_bytes(b"left behind")
    mine = tmp_path / "unrelated"
    mine.write_bytes(b"not ours")
    transport = ShmTransport(root=tmp_path)
    assert not dead.exists()
    await transport.open(Prepared(), timeout_s=1)
    (handles,) = await transport.stage(BUCKET, FLAT)
    described = json.loads(handles.handles[0])
    assert described["kind"] == "shm"
    assert described["size_bytes"] == BUCKET.size_bytes
    assert [entry["offset_bytes"] for entry in described["tensors"]] == [0, 16]
    assert content(described["path"]) == bytes(FLAT.tolist())
    await transport.unstage(BUCKET)
    assert names(tmp_path) == {mine.name}
    await transport.stage(BUCKET, FLAT)
    await transport.close(broken=True)
    assert names(tmp_path) == {mine.name}


async def test_disk_writes_a_folder_that_everybody_may_read(tmp_path: Path) -> None:
    transport = DiskTransport(directory=tmp_path, run_id="run")
    await transport.open(Prepared(transaction_id="run/1/2/3"), timeout_s=1)
    (handles,) = await transport.stage(BUCKET, FLAT)
    file = Path(handles.handles[0].decode()) / "model.safetensors"
    assert file.stat().st_mode & 0o444 == 0o444
    loaded, expected = load_file(file), read_bucket(BUCKET, FLAT)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    await transport.close(broken=False)
    assert not file.parent.exists()


def _join_as_engine(port: int, name: str, received: list[torch.Tensor], leave: threading.Event) -> None:
    """An engine's side, over torch's classes without its global tables."""
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    keys = c10d.PrefixStore("cpu/", c10d.PrefixStore(f"{name}/", c10d.PrefixStore(name, store)))
    group = dist.ProcessGroupGloo(keys, 1, 2, timeout)
    tensor = torch.empty(BUCKET.size_bytes, dtype=torch.uint8)
    options: Any = c10d.BroadcastOptions()
    options.rootRank = 0
    group.broadcast([tensor], options).wait()
    received.append(tensor)
    leave.wait(100)


async def test_gloo_broadcasts_and_gives_up_at_the_deadline() -> None:
    transport = GlooTransport(master_address="127.0.0.1")
    received: list[torch.Tensor] = []
    leave = threading.Event()
    engine = threading.Thread(
        target=_join_as_engine, args=(transport.master_port, "run/1/1/1", received, leave), daemon=True
    )
    engine.start()
    try:
        await transport.open(Prepared(group_name="run/1/1/1", world_size=2), timeout_s=60)
        await transport.send(BUCKET, FLAT, timeout_s=60)
        big = Bucket(1, plan_buckets([("c", "uint8", (1 << 26,))], bucket_bytes=1 << 27)[0].slots)
        with pytest.raises(Unavailable, match="bucket 1 was not taken"):
            await transport.send(big, torch.zeros(1 << 26, dtype=torch.uint8), timeout_s=0.3)
    finally:
        leave.set()
        await transport.close(broken=True)
        await asyncio.to_thread(engine.join, 60)
    assert torch.equal(received[0], FLAT)


async def test_gloo_gives_up_on_members_that_never_come() -> None:
    transport = GlooTransport(master_address="127.0.0.1")
    await transport.open(Prepared(group_name="run/1/1/2", world_size=2), timeout_s=0.5)
    with pytest.raises(Unavailable, match=r"group run/1/1/2 of 2 did not form"):
        await transport.send(BUCKET, FLAT, timeout_s=60)
    await transport.close(broken=True)


async def test_gloo_a_group_that_never_forms_delays_no_other() -> None:
    transport = GlooTransport(master_address="127.0.0.1")
    await transport.open(Prepared(group_name="run/1/1/3", world_size=2), timeout_s=60)
    sending = asyncio.create_task(transport.send(BUCKET, FLAT, timeout_s=60))
    received: list[torch.Tensor] = []
    leave = threading.Event()
    engine = threading.Thread(
        target=_join_as_engine, args=(transport.master_port, "run/1/1/4", received, leave), daemon=True
    )
    try:
        async with asyncio.timeout(60):
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            await transport.close(broken=True)
            engine.start()
            await transport.open(Prepared(group_name="run/1/1/4", world_size=2), timeout_s=60)
            await transport.send(BUCKET, FLAT, timeout_s=60)
    finally:
        leave.set()
        await transport.close(broken=False)
        await asyncio.to_thread(engine.join, 60)
    assert torch.equal(received[0], FLAT)


def test_settings_choose_the_transport(tmp_path: Path) -> None:
    disk = build_transport(PublishSettings(transport="disk", disk_dir=str(tmp_path)), run_id="r")
    assert disk.single_bucket
    assert isinstance(build_transport(PublishSettings(transport="shm"), run_id="r"), ShmTransport)
    assert build_transport(PublishSettings(), run_id="r").master_port > 0


async def test_cuda_ipc_says_what_to_do_about_weights_that_are_on_no_gpu() -> None:
    transport = build_transport(PublishSettings(transport="cuda_ipc"), run_id="run")
    await transport.open(Prepared(), timeout_s=1)
    with pytest.raises(FailedPrecondition, match=r"weights are on cpu; set trainer\.device to cuda"):
        await transport.stage(BUCKET, FLAT)
    await transport.close(broken=True)


@pytest.mark.parametrize(
    "uuids, says",
    [
        (("GPU-b", "GPU-c"), "engine e runs on GPU-b, GPU-c, the trainer's rank 0 on GPU-a"),
        ((), "GPUs that nobody named"),
    ],
)
def test_cuda_ipc_wants_the_gpu_of_rank_0_among_the_engines(uuids: tuple[str, ...], says: str) -> None:
    with pytest.raises(FailedPrecondition, match=says):
        cuda_ipc._require_here(WeightMember(engine_id="e", gpu_uuids=uuids), "GPU-a")
    for seen in (("GPU-a",), ("GPU-a", "GPU-b"), ("GPU-b", "GPU-a")):
        cuda_ipc._require_here(WeightMember(engine_id="e", gpu_uuids=seen), "GPU-a")


@pytest.mark.parametrize("reader, waits", [("GPU-a", True), ("GPU-b", False)])
def test_a_handle_is_opened_as_a_tensor_of_its_readers_gpu(
    reader: str, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang copies what it opens on another GPU, and hands that copy on."""
    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    shared = dict.fromkeys(names) | {"storage_device": 3, "event_sync_required": True, "storage_handle": b"h"}
    monkeypatch.setattr(
        reductions, "reduce_tensor", lambda _: (reductions.rebuild_cuda_tensor, tuple(shared.values()))
    )
    opens, arguments = cuda_ipc._SharedTensor(FLAT, reader, here="GPU-a").__reduce__()
    assert opens is reductions.rebuild_cuda_tensor
    expected = shared | {"storage_device": reader.removeprefix("GPU-"), "event_sync_required": waits}
    assert dict(zip(names, arguments, strict=True)) == expected


async def test_cuda_ipc_gives_a_signal_to_who_has_copied_from_there(monkeypatch: pytest.MonkeyPatch):
    """What it shares needs a GPU; whom it tells what does not."""
    monkeypatch.setattr(cuda_ipc, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(cuda_ipc, "_at_rest", lambda device: None)
    monkeypatch.setattr(cuda_ipc, "encode", lambda text, named=(): f"{len(named)} {text}".encode())
    monkeypatch.setattr(cuda_ipc.CudaIpcTransport, "_here", lambda self, device: "GPU-1")
    weights = {"w": torch.zeros(4)}
    manifest = (TensorSpec(name="w", dtype="float32", shape=(4,)),)
    members = tuple(
        WeightMember(engine_id=name, gpu_uuids=("GPU-1",), weight_hook="hook", instance_id=name)
        for name in ("a", "b")
    )
    transport = cuda_ipc.CudaIpcTransport()

    async def share(number: int) -> dict[str, HandlesOfEngine]:
        prepared = Prepared(transaction_id=f"t{number}", members=members)
        await transport.open(prepared, timeout_s=60.0)
        return {each.engine_id: each for each in await transport.share(prepared, manifest, weights)}

    assert [each.signal for each in (await share(1)).values()] == ["", ""]
    transport.taken({"a"})
    second = await share(2)
    assert second["b"].signal == "", "it failed, and is told all of it again"
    assert second["b"].handles[0].startswith(b"2 "), "the stamp and the tensor"
    said = json.loads(second["a"].signal)
    assert (said["transaction"], said["stamp"]) == ("t2", 2)
    assert "places" not in said
    assert second["a"].handles == (f"0 {second['a'].signal}".encode(),), "for who takes no signals"
    weights = {"w": torch.zeros(4)}
    assert (await share(3))["a"].signal == "", "they lie elsewhere"
