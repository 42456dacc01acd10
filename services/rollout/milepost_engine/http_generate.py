"""`POST /generate`: SGLang's native generation route.

One prompt gives one object, a list of prompts or `n` > 1 a list of them (in order of prompt, then sample).
With `stream`, each event holds one generation as it stands (cumulative), with `index` where there are
several, and `data: [DONE]` ends the stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from starlette.types import Receive, Scope, Send

from milepost_engine.engine import Waiter
from milepost_engine.http_common import SSE_DONE, GenerationEndpoint, JsonResponse, sse
from milepost_engine.replies import ReplyStyle, render
from milepost_engine.requests import parse_generate, parse_object


class GenerateEndpoint(GenerationEndpoint):
    """Answers `/generate`."""

    async def handle(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates for one body."""
        work = parse_generate(parse_object(body), limits=self.engine.limits, text=self.engine.text)
        style = ReplyStyle(
            self.engine.text, self.engine.dialect.reports_version_spans, token_texts=work.text_in_logprobs
        )
        waiter = self.engine.submit(work.prompts, stream=work.stream)
        if work.stream:
            events = self._events(waiter, style, single=work.single)
            await self.stream(events, waiter, scope, receive, send)
        elif await self.wait(waiter, receive):
            version = self.engine.scheduler.weight_version
            replies = [render(generation, style, version=version) for generation in waiter.generations]
            await JsonResponse(replies[0] if work.single else replies)(scope, receive, send)

    async def _events(self, waiter: Waiter, style: ReplyStyle, *, single: bool) -> AsyncIterator[bytes]:
        index = {id(generation): at for at, generation in enumerate(waiter.generations)}
        async for generation in waiter.changes():
            chunk = render(generation, style, version=self.engine.scheduler.weight_version)
            if not single:
                chunk["index"] = index[id(generation)]
            yield sse(chunk)
        yield SSE_DONE
