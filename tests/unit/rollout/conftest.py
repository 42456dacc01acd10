"""A character tokenizer with a chat template, and an engine that answers as a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from milepost_rollout.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|start|>", "<|end|>")


def write_tokenizer(folder: Path, *, template: str | None = CHATML) -> Path:
    """Writes a tokenizer of one token a character, with two special tokens."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    fast = FastTokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token=" "))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken(s, special=True) for s in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def reply(
    ids: list[int],
    *,
    finish: Mapping[str, Any] | None = None,
    spans: list[tuple[int, int, str]] | None = None,
    logprob: float = -0.5,
    **meta: Any,
) -> dict[str, Any]:
    """SGLang's reply for these output ids."""
    info: dict[str, Any] = {
        "finish_reason": dict(finish or {"type": "stop", "matched": ids[-1] if ids else None}),
        "output_token_logprobs": [[logprob, i, None] for i in ids],
        "weight_version": "r/7/3",
        **meta,
    }
    if spans is not None:
        info["weight_versions"] = [{"start": s, "end": e, "version": v} for s, e, v in spans]
    return {"text": "ignored", "output_ids": ids, "meta_info": info}


@dataclass
class FakeEngine:
    """An HTTP server whose `/generate` is a function of the test's."""

    url: str = ""
    answer: Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]] | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    reply = staticmethod(reply)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        assert self.answer is not None
        try:
            return await self.answer(request, body)
        except asyncio.CancelledError:
            self.disconnected.set()
            raise


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    fake = FakeEngine()
    app = web.Application()
    app.router.add_post("/generate", fake.handle)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield fake
    await runner.cleanup()
