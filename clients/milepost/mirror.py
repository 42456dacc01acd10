"""Weights by `disk` between hosts that share no folder: files over HTTP, verified beside the engine.

    trainer   writes /weights/<run>/<transaction>/model.safetensors, then asks each mirror for that folder
    mirror    GETs the files from the file server beside the trainer, compares sizes and SHA-256, and shows
              the folder under the same path only when it is whole; then forgets the run's older folders
    router    tells engines to load the path; one whose mirror failed has no such folder and refuses

    GET  /health        200
    GET  /FOLDER/FILE   the file (file server alone); FOLDER is <run>/<transaction>
    POST /mirror        an Order as JSON -> 200 once the folder is whole (mirror alone)

A mirror fetches from the one source that it was started with, and writes under its own folder: an order
brings names and digests, never addresses. State is what the folder holds; a restart keeps it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import re
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from milepost.errors import DataLoss, InvalidArgument, MilepostError, Unavailable

log = logging.getLogger(__name__)

CHUNK_BYTES = 1024 * 1024
READ_TIMEOUT_S = 30.0
_MAX_ORDER_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, kw_only=True)
class FileOfFolder:
    """One file.

    Attributes:
      name: within the folder.
      size_bytes: of the file.
      sha256: of its bytes, in hexadecimal.
    """

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a mirror is to fetch.

    Attributes:
      run_id: first part of the path under the root.
      folder: second part.
      files: all that is in it.
    """

    run_id: str
    folder: str
    files: tuple[FileOfFolder, ...]


def describe(folder: Path, *, run_id: str) -> Order:
    """The order for a folder that is written; reads every file once."""
    files = [
        FileOfFolder(name=path.name, size_bytes=path.stat().st_size, sha256=_digest(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    return Order(run_id=run_id, folder=folder.name, files=tuple(files))


def ask(address: str, order: Order, *, timeout_s: float) -> None:
    """Has a mirror fetch a folder; returns once it is whole there. Blocks.

    Args:
      address: `host:port` of the mirror.
      order: what to fetch.
      timeout_s: between two signs of life of the mirror, which gives none until it is done.

    Raises:
      Unavailable: the mirror does not answer, or could not fetch what was ordered.
    """
    url = f"http://{address}/mirror"
    body = json.dumps(asdict(order)).encode()
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        why = error.read(2000).decode(errors="replace")
        raise Unavailable(f"mirror {address}: {why}", reason="MIRROR_FAILED") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"mirror {address} does not answer: {error}", reason="MIRROR_AWAY") from error


class Mirror:
    """Fetches folders of one source into one root; one order at a time.

    Args:
      source: URL of the file server, http://host:port.
      root: where folders appear, as `<run_id>/<folder>`.
    """

    def __init__(self, source: str, *, root: Path) -> None:
        if not source.startswith(("http://", "https://")):
            raise InvalidArgument(f"--source {source}: give the URL of a file server, http://host:port")
        self._source, self._root = source.rstrip("/"), root
        self._lock = threading.Lock()

    def fetch(self, order: Order) -> None:
        """Fetches what is not there yet.

        Raises:
          InvalidArgument: a name of the order is none.
          Unavailable: the source does not answer.
          DataLoss: the bytes are not those of the order.
        """
        for name in (order.run_id, order.folder, *(file.name for file in order.files)):
            _checked(name)
        with self._lock:
            target = self._root / order.run_id / order.folder
            if target.is_dir():  # it appears only when it is whole
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".part-", dir=self._root) as work:
                for file in order.files:
                    self._fetch_file(f"{order.run_id}/{order.folder}", file, into=Path(work) / "new")
                (Path(work) / "new").rename(target)
            for other in target.parent.iterdir():
                if other != target:
                    shutil.rmtree(other, ignore_errors=True)
            log.info("%s/%s is here", order.run_id, order.folder)

    def _fetch_file(self, folder: str, file: FileOfFolder, *, into: Path) -> None:
        into.mkdir(exist_ok=True)
        url, digest, size_bytes = f"{self._source}/{folder}/{file.name}", hashlib.sha256(), 0
        try:
            with (
                urllib.request.urlopen(url, timeout=READ_TIMEOUT_S) as reply,
                (into / file.name).open("wb") as out,
            ):
                while size_bytes <= file.size_bytes and (chunk := reply.read(CHUNK_BYTES)):
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    out.write(chunk)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"{url}: {error}", reason="SOURCE_AWAY") from error
        if (size_bytes, digest.hexdigest()) != (file.size_bytes, file.sha256):
            raise DataLoss(
                f"{url}: {size_bytes} bytes with SHA-256 {digest.hexdigest()}, ordered were "
                f"{file.size_bytes} with {file.sha256}; the trainer tries again by itself"
            )


def serve_files(root: Path, *, listen: str) -> ThreadingHTTPServer:
    """A server of the files two folders below `root`; the caller runs and closes it."""

    class Files(_Handler):
        def do_GET(self) -> None:
            if self.path == "/health":
                self.say(200, "well")
                return
            try:
                run_id, folder, name = (_checked(part) for part in self.path.strip("/").split("/"))
                file = (root / run_id / folder / name).open("rb")
            except (MilepostError, ValueError, OSError):
                self.say(404, f"{self.path}: no such file")
                return
            with file:
                self.send_response(200)
                self.send_header("content-type", "application/octet-stream")
                self.send_header("content-length", str(Path(file.name).stat().st_size))
                self.end_headers()
                shutil.copyfileobj(file, self.wfile, CHUNK_BYTES)

    return _server(Files, listen)


def serve_mirror(mirror: Mirror, *, listen: str) -> ThreadingHTTPServer:
    """A server that takes orders; the caller runs and closes it."""

    class Orders(_Handler):
        def do_GET(self) -> None:
            self.say(*((200, "well") if self.path == "/health" else (404, "POST /mirror")))

        def do_POST(self) -> None:
            try:
                mirror.fetch(_order_of(self.rfile.read(self.size_of_body())))
            except InvalidArgument as error:
                self.say(400, str(error))
            except (MilepostError, OSError) as error:
                log.warning("%s", error)
                self.say(502, str(error))
            else:
                self.say(200, "whole")

    return _server(Orders, listen)


class _Handler(BaseHTTPRequestHandler):
    """What both servers share."""

    protocol_version = "HTTP/1.1"
    timeout = READ_TIMEOUT_S  # of a connection on which nothing moves

    def say(self, status: int, text: str) -> None:
        """Answers with a line of text."""
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", "text/plain")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def size_of_body(self) -> int:
        """Bytes that follow the head; more than an order has are refused."""
        size_bytes = int(self.headers.get("content-length") or 0)
        if not 0 < size_bytes <= _MAX_ORDER_BYTES:
            self.close_connection = True
            raise InvalidArgument(f"content-length {size_bytes}: an order has 1 to {_MAX_ORDER_BYTES} bytes")
        return size_bytes

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged for who looks closely."""
        log.debug(format, *args)


def _server(handler: Callable[..., BaseHTTPRequestHandler], listen: str) -> ThreadingHTTPServer:
    host, _, port = listen.rpartition(":")
    if not port.isdigit():
        raise InvalidArgument(f"--listen {listen}: give host:port")
    server = ThreadingHTTPServer((host, int(port)), handler)
    server.daemon_threads = True
    return server


def _order_of(body: bytes) -> Order:
    try:
        said = json.loads(body)
        files = tuple(FileOfFolder(**file) for file in said.pop("files"))
        return Order(**said, files=files)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(f"not an order: {error}; give run_id, folder and files as JSON") from error


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} is no name of a run, a folder or a file")
    return name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
