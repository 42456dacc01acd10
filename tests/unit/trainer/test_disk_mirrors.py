"""The disk transport with mirrors: the folder is whole beside the engines before their header goes out, and a
mirror that is away holds nobody up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from milepost.mirror import Mirror, serve_files, serve_mirror
from milepost.types import Prepared
from milepost_trainer.buckets import plan_buckets
from milepost_trainer.transports.disk import DiskTransport

(BUCKET,) = plan_buckets([("a", "float32", (2, 2)), ("b", "bfloat16", (3,))], bucket_bytes=100)
FLAT = torch.arange(BUCKET.size_bytes, dtype=torch.uint8)
NOBODY = "127.0.0.1:1"


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


async def test_a_folder_is_mirrored_before_it_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    here.mkdir()
    with serving(serve_files(there, listen="127.0.0.1:0")) as source:
        mirror = serve_mirror(Mirror(f"http://{source}", root=here), listen="127.0.0.1:0")
        with serving(mirror) as address, caplog.at_level(logging.WARNING):
            transport = DiskTransport(directory=there, run_id="run", mirrors=(NOBODY, address))
            await transport.open(Prepared(transaction_id="run/1/2/3"), timeout_s=20)
            (handles,) = await transport.stage(BUCKET, FLAT)
            written = Path(handles.handles[0].decode()) / "model.safetensors"
            mirrored = here / written.relative_to(there)
            assert mirrored.read_bytes() == written.read_bytes()
            assert mirrored.stat().st_mode & 0o444 == 0o444
            await transport.close(broken=False)
    assert NOBODY in caplog.text
    assert address not in caplog.text
