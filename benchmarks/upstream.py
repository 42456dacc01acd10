"""A cheap engine for the routers that are measured: a bare HTTP server with one fixed reply a size.

    python -m benchmarks.upstream PORTS            # prints `upstream ready http://host:port,http://host:port`

`/generate` answers at once with the small reply, or with 64 KiB where the request says so; every other path
answers with what routers ask of an engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import cast

import uvloop

LARGE = b"an answer of 64 KiB"
"""A request with these words in its body gets the large reply."""
LARGE_BYTES = 64 * 1024


def request_body(*, large: bool) -> bytes:
    """A request as a gateway sends it: 64 prompt tokens."""
    said = LARGE.decode() if large else "an answer"
    sampling = {"max_new_tokens": 64, "temperature": 1.0, "top_p": 1.0}
    body = {"rid": said, "input_ids": list(range(64)), "sampling_params": sampling, "return_logprob": True}
    return json.dumps(body).encode()


def reply_body(*, large: bool) -> bytes:
    """The reply to it, of about 500 bytes or of exactly 64 KiB."""
    meta = {
        "finish_reason": {"type": "length", "length": 64},
        "weight_version": "run/1/0",
        "completion_tokens": 64,
    }
    reply = {"text": "", "output_ids": list(range(100, 164)), "meta_info": meta}
    if large:
        reply["text"] = "x" * (LARGE_BYTES - len(json.dumps(reply)))
    return json.dumps(reply).encode()


def _message(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


INFO = {
    "status": "ok",
    "model_path": "tiny",
    "served_model_name": "tiny",
    "is_generation": True,
    "weight_version": "run/1/0",
    "version": "0.5.21",
    "tp_size": 1,
    "dp_size": 1,
    "context_length": 4096,
}
_SMALL_REPLY, _LARGE_REPLY = _message(reply_body(large=False)), _message(reply_body(large=True))
_INFO_REPLY = _message(json.dumps(INFO).encode())


class Engine(asyncio.Protocol):
    """One connection to the engine."""

    def __init__(self) -> None:
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes came: answers every request that is complete."""
        self._rest += data
        while (end := self._rest.find(b"\r\n\r\n")) >= 0:
            head = self._rest[:end]
            whole = end + 4 + _content_length(head)
            if len(self._rest) < whole:
                return
            body, self._rest = self._rest[end + 4 : whole], self._rest[whole:]
            self._transport.write(self._answer(head.split(b" ", 2)[1], body))

    def _answer(self, path: bytes, body: bytes) -> bytes:
        if path == b"/generate":
            return _LARGE_REPLY if LARGE in body else _SMALL_REPLY
        return _INFO_REPLY


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


async def main(count: int) -> None:
    """Serves on `count` free ports until it is killed."""
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(Engine, "127.0.0.1", 0) for _ in range(count)]
    urls = [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    print(f"upstream ready {','.join(urls)}", flush=True)
    await asyncio.Event().wait()  # its parent ends it, and the kernel does when the parent dies


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
