"""Weights over HTTP: what is whole appears, what is not never does; no order reaches outside of the root."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from milepost.errors import DataLoss, InvalidArgument, Unavailable
from milepost.mirror import FileOfFolder, Mirror, Order, ask, describe, serve_files, serve_mirror

Serve = Callable[[ThreadingHTTPServer], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Runs servers until the test ends; gives their `host:port`."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(server: ThreadingHTTPServer) -> str:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return f"127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder that the trainer wrote."""
    folder = tmp_path / "there" / "demo" / "demo_1_2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    return folder


@pytest.fixture
def source(tmp_path: Path, serve: Serve, written: Path) -> str:
    """URL of a server of these files."""
    return "http://" + serve(serve_files(tmp_path / "there", listen="127.0.0.1:0"))


def files_of(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def test_an_order_brings_the_folder_to_the_same_path(
    tmp_path: Path, serve: Serve, source: str, written: Path
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    mirror = serve(serve_mirror(Mirror(source, root=here), listen="127.0.0.1:0"))
    order = describe(written, run_id="demo")
    ask(mirror, order, timeout_s=10)
    ask(mirror, order, timeout_s=10)  # nothing is done twice, and it is no failure
    assert (here / "demo" / "demo_1_2" / "model.safetensors").read_bytes() == (
        written / "model.safetensors"
    ).read_bytes()
    assert files_of(here) == ["demo", "demo/demo_1_2", "demo/demo_1_2/model.safetensors"]


def test_the_newest_folder_of_a_run_replaces_the_older(tmp_path: Path, source: str, written: Path) -> None:
    mirror = Mirror(source, root=tmp_path / "here")
    (tmp_path / "here").mkdir()
    mirror.fetch(describe(written, run_id="demo"))
    newer = written.rename(written.with_name("demo_1_3"))
    mirror.fetch(describe(newer, run_id="demo"))
    assert [p.name for p in (tmp_path / "here" / "demo").iterdir()] == ["demo_1_3"]


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"size_bytes": 1000}, {"size_bytes": 2_000_000}])
def test_other_bytes_than_ordered_never_appear(
    tmp_path: Path, source: str, written: Path, change: dict[str, object]
) -> None:
    (tmp_path / "here").mkdir()
    order = describe(written, run_id="demo")
    wrong = replace(order, files=tuple(replace(file, **change) for file in order.files))
    with pytest.raises(DataLoss, match="SHA-256"):
        Mirror(source, root=tmp_path / "here").fetch(wrong)
    assert files_of(tmp_path / "here") == ["demo"]


def test_a_file_that_is_not_there_is_a_failure_that_the_trainer_is_told(
    tmp_path: Path, serve: Serve, source: str, written: Path
) -> None:
    (tmp_path / "here").mkdir()
    mirror = serve(serve_mirror(Mirror(source, root=tmp_path / "here"), listen="127.0.0.1:0"))
    order = describe(written, run_id="demo")
    (written / "model.safetensors").unlink()
    with pytest.raises(Unavailable, match="404"):
        ask(mirror, order, timeout_s=10)
    assert files_of(tmp_path / "here") == ["demo"]


@pytest.mark.parametrize("name", ["..", "../etc", "/etc", "a/b", "", ".hidden", 7])
@pytest.mark.parametrize("field", ["run_id", "folder", "file"])
def test_no_name_leads_out_of_the_root(tmp_path: Path, field: str, name: str) -> None:
    file = FileOfFolder(name=name if field == "file" else "model", size_bytes=0, sha256="")
    names = {"run_id": "demo", "folder": "f"} | ({field: name} if field != "file" else {})
    with pytest.raises(InvalidArgument, match="is no name"):
        Mirror("http://127.0.0.1:1", root=tmp_path).fetch(Order(**names, files=(file,)))
    assert files_of(tmp_path) == []


def test_a_mirror_that_is_not_there_is_unavailable(written: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        ask("127.0.0.1:1", describe(written, run_id="demo"), timeout_s=10)
