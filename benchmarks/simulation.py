"""What stands in for GPUs where a loop is measured: engines that answer after a chosen time, and a tokenizer.

A simulated engine speaks SGLang's HTTP surface as far as router and gateway use it. It keeps no weights: an
update changes the version string that it reports, which is what the services around it go by.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

RUN_ID = "bench"
TOKENS = 64


def save_tokenizer(folder: Path) -> Path:
    """A tokenizer of a few words; returns its folder."""
    folder.mkdir(exist_ok=True)
    words = {"<unk>": 0, "?": 1, **{f"w{i}": i for i in range(2, 256)}}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    return folder


class SimulatedEngine:
    """One engine.

    Args:
      answer_s: how long a request takes.
    """

    def __init__(self, answer_s: float) -> None:
        self._answer_s = answer_s
        self._version = "default"
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[str]:
        """Serves until the block ends; gives its URL."""
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_route("*", "/{path:.*}", self._admin)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(self._answer_s)
        ids = list(range(2, 2 + TOKENS))
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length", "length": TOKENS},
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
            "weight_version": self._version,
            "weight_versions": [{"version": self._version, "start": 0, "end": TOKENS}],
        }
        return web.json_response({"text": "", "output_ids": ids, "meta_info": meta})

    async def _admin(self, request: web.Request) -> web.Response:
        """Everything else that a router says to an engine."""
        if request.path == "/update_weight_version":
            self._version = (await request.json())["new_version"]
        elif request.path in ("/model_info", "/get_model_info"):
            return web.json_response({"weight_version": self._version})
        elif request.path in ("/server_info", "/get_server_info"):
            return web.json_response({"engine": "milepost_engine", "version": "0.5.21", "tp_size": 1})
        elif request.path == "/weights_checker":
            return web.json_response({"success": True, "ranks": [{"per_gpu_checksum": "simulated"}]})
        return web.json_response({"success": True, "message": "done"})
