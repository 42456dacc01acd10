"""`/v1`: OpenAI's chat and text completions over the same scheduler.

Sampling fields are OpenAI's, plus SGLang's extras (top_k, min_p, min_tokens, repetition_penalty,
stop_token_ids, ignore_eos, skip_special_tokens, no_stop_trim, rid). Choices carry `matched_stop`, replies
`metadata` with the weight version and its spans, as SGLang's do. The model field is not compared with the
served name.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from milepost_engine.engine import Engine, Waiter
from milepost_engine.errors import InvalidRequest
from milepost_engine.generation import FinishReason, Generation, LogprobOptions, TopEntry, version_spans
from milepost_engine.http_admin import engine_of
from milepost_engine.http_common import SSE_DONE, GenerationEndpoint, JsonResponse, sse
from milepost_engine.params import SamplingParams, parse_sampling_params
from milepost_engine.requests import PromptWork, new_rid, parse_object, prompt_work

router = APIRouter(default_response_class=JsonResponse)

_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}
_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "skip_special_tokens",
    "no_stop_trim",
)
_FINISH = {"stop": "stop", "length": "length", "abort": "abort"}
_MAX_TOP_LOGPROBS = 20


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The one model, in a list."""
    return JsonResponse({"object": "list", "data": [_card(engine_of(request))]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """The one model by its name; another name is not found, in OpenAI's words."""
    engine = engine_of(request)
    if name == engine.settings.name:
        return JsonResponse(_card(engine))
    message = f"The model '{name}' does not exist; this engine serves '{engine.settings.name}'"
    detail = {
        "message": message,
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return JsonResponse({"error": detail}, status_code=404)


def _card(engine: Engine) -> dict[str, Any]:
    return {
        "id": engine.settings.name,
        "object": "model",
        "created": int(engine.started_s),
        "owned_by": "milepost",
        "root": engine.settings.name,
        "parent": None,
        "max_model_len": engine.limits.context_length,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call, checked.

    Attributes:
        works: Its prompts.
        texts: The prompts as text, where they are to be echoed.
        stream, usage_in_stream: Events instead of one reply, and a last one with the token counts.
        top: Alternatives per token; None reports no log-probs.
        id, created, model: What every reply repeats.
    """

    works: list[PromptWork]
    texts: list[str]
    stream: bool
    usage_in_stream: bool
    top: int | None
    id: str
    created: int
    model: str


class _OpenAIEndpoint(GenerationEndpoint):
    """What both routes share; subclasses give the shapes."""

    openai = True
    prefix = ""
    object_name = ""
    chunk_name = ""

    def read_prompts(self, raw: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
        """Token ids of the prompts, and the texts to echo."""
        raise NotImplementedError

    def read_top(self, raw: dict[str, Any]) -> int | None:
        """How many alternatives to report per token; None for no log-probs."""
        raise NotImplementedError

    def choice(self, index: int, generation: Generation, call: Call) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def delta(self, index: int, generation: Generation, call: Call, seen: _Seen) -> dict[str, Any]:
        """A choice of a chunk: what is new since `seen`."""
        raise NotImplementedError

    async def handle(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Generates for one body."""
        call = self._read(parse_object(body))
        waiter = self.engine.submit(call.works, stream=call.stream)
        if call.stream:
            await self.stream(self._events(waiter, call), waiter, scope, receive, send)
        elif await self.wait(waiter, receive):
            await JsonResponse(self._reply(waiter, call))(scope, receive, send)

    def _read(self, raw: dict[str, Any]) -> Call:
        prompts, texts = self.read_prompts(raw)
        params, top = _sampling(raw), self.read_top(raw)
        options = LogprobOptions(wanted=top is not None, top=top or 0)
        rid = raw.get("rid") or new_rid()
        if not isinstance(rid, str):
            raise InvalidRequest(f"rid is {rid!r}: it must be a string")
        works: list[PromptWork] = []
        for index, ids in enumerate(prompts):
            own = _filling(params, room=self.engine.limits.context_length - len(ids))
            name = rid if len(prompts) == 1 else f"{rid}_{index}"
            works.append(prompt_work(name, ids, own, options, limits=self.engine.limits))
        stream_options = raw.get("stream_options")
        return Call(
            works=works,
            texts=texts,
            stream=_flag(raw, "stream"),
            usage_in_stream=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
            top=top,
            id=f"{self.prefix}-{rid}",
            created=int(time.time()),
            model=str(raw.get("model") or self.engine.settings.name),
        )

    def _reply(self, waiter: Waiter, call: Call) -> dict[str, Any]:
        done = waiter.generations
        return {
            "id": call.id,
            "object": self.object_name,
            "created": call.created,
            "model": call.model,
            "choices": [self.choice(index, generation, call) for index, generation in enumerate(done)],
            "usage": _usage(done, call),
            "metadata": self._metadata(done[0]),
        }

    def _metadata(self, generation: Generation) -> dict[str, Any]:
        version = generation.final_version or self.engine.scheduler.weight_version
        metadata: dict[str, Any] = {"weight_version": version}
        if self.engine.dialect.reports_version_spans:
            tokens = len(generation.output_ids)
            metadata["weight_versions"] = version_spans(generation.version_marks, version, tokens)
        return metadata

    async def _events(self, waiter: Waiter, call: Call) -> AsyncIterator[bytes]:
        head = {"id": call.id, "object": self.chunk_name, "created": call.created, "model": call.model}
        index = {id(generation): at for at, generation in enumerate(waiter.generations)}
        seen = [_Seen() for _ in waiter.generations]
        async for generation in waiter.changes():
            at = index[id(generation)]
            yield sse(head | {"choices": [self.delta(at, generation, call, seen[at])]})
        if call.usage_in_stream:
            yield sse(head | {"choices": [], "usage": _usage(waiter.generations, call)})
        yield SSE_DONE

    # ---- pieces ----------------------------------------------------------------------------------------

    def text_of(self, generation: Generation, finish: FinishReason | None) -> str:
        """Text so far."""
        ids = list(generation.output_ids)
        matched = finish.matched if finish else None
        return self.engine.text.output(ids, generation.params, matched=matched, ended=finish is not None)

    def ending(self, finish: FinishReason | None) -> dict[str, Any]:
        """The fields of a choice that say how it ended."""
        return {
            "finish_reason": _FINISH[finish.kind] if finish else None,
            "matched_stop": finish.matched if finish else None,
        }

    def token_texts(self, entries: TopEntry) -> list[tuple[str, float]]:
        """Texts for (log-prob, token id) pairs."""
        return [(self.engine.text.token(token), logprob) for logprob, token in entries]


@dataclass(slots=True)
class _Seen:
    """What a stream has sent of one choice."""

    characters: int = 0
    tokens: int = 0
    begun: bool = False

    def advance(self, text: str, num_tokens: int) -> tuple[str, slice]:
        """The new text, and the slice of new tokens."""
        new, tokens = text[self.characters :], slice(self.tokens, num_tokens)
        self.characters, self.tokens = max(self.characters, len(text)), num_tokens
        return new, tokens


class ChatEndpoint(_OpenAIEndpoint):
    """Answers `/v1/chat/completions`."""

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def read_prompts(self, raw: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
        """Renders the conversation with the model's chat template."""
        messages = raw.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise InvalidRequest(
                f"messages is {messages!r}: it must be a list of messages with role and content"
            )
        extra = raw.get("chat_template_kwargs") or {}
        if not isinstance(extra, dict):
            raise InvalidRequest(f"chat_template_kwargs is {extra!r}: it must be an object")
        goes_on = _flag(raw, "continue_final_message")
        options: dict[str, Any] = {"add_generation_prompt": not goes_on, **cast(dict[str, Any], extra)}
        if goes_on:
            options["continue_final_message"] = True
        if raw.get("tools"):
            options["tools"] = raw["tools"]
        return [self.engine.text.render_chat(messages, **options)], []

    def read_top(self, raw: dict[str, Any]) -> int | None:
        """`logprobs` switches them on, `top_logprobs` counts the alternatives."""
        return _count(raw, "top_logprobs") if _flag(raw, "logprobs") else None

    def choice(self, index: int, generation: Generation, call: Call) -> dict[str, Any]:
        """One message."""
        message = {"role": "assistant", "content": self.text_of(generation, generation.finish)}
        logprobs = self._logprobs(generation, call, slice(None))
        return {"index": index, "message": message, "logprobs": logprobs, **self.ending(generation.finish)}

    def delta(self, index: int, generation: Generation, call: Call, seen: _Seen) -> dict[str, Any]:
        """New content; the role with the first."""
        finish = generation.finish
        count = len(generation.output_ids)
        content, tokens = seen.advance(self.text_of(generation, finish), count)
        delta = {"content": content} if seen.begun else {"role": "assistant", "content": content}
        seen.begun = True
        logprobs = self._logprobs(generation, call, tokens)
        return {"index": index, "delta": delta, "logprobs": logprobs, **self.ending(finish)}

    def _logprobs(self, generation: Generation, call: Call, part: slice) -> dict[str, Any] | None:
        if call.top is None:
            return None
        chosen = list(zip(generation.output_logprobs, generation.output_ids, strict=False))[part]
        best = generation.output_top[part] if call.top else [[] for _ in chosen]
        content = [
            {**_token_entry(text, logprob), "top_logprobs": [_token_entry(*t) for t in self.token_texts(top)]}
            for (text, logprob), top in zip(self.token_texts(chosen), best, strict=False)
        ]
        return {"content": content, "refusal": None}


class CompletionsEndpoint(_OpenAIEndpoint):
    """Answers `/v1/completions`."""

    prefix = "cmpl"
    object_name = "text_completion"
    chunk_name = "text_completion"

    def read_prompts(self, raw: dict[str, Any]) -> tuple[list[list[int]], list[str]]:
        """A string, token ids, or a list of either."""
        prompt = raw.get("prompt")
        items = [prompt] if isinstance(prompt, str) or _is_token_list(prompt) else prompt
        if not isinstance(items, list) or not items:
            raise InvalidRequest(f"prompt is {prompt!r}: it must be a string, token ids, or a list of either")
        text = self.engine.text
        ids: list[list[int]] = []
        for item in cast(list[Any], items):
            if not isinstance(item, str) and not _is_token_list(item):
                raise InvalidRequest(f"prompt holds {item!r}: each must be a string or a list of token ids")
            ids.append(text.encode(item) if isinstance(item, str) else item)
        if not _flag(raw, "echo"):
            return ids, []
        return ids, [text.decode(tokens, SamplingParams()) for tokens in ids]

    def read_top(self, raw: dict[str, Any]) -> int | None:
        """`logprobs` is a count here."""
        return None if raw.get("logprobs") is None else _count(raw, "logprobs")

    def _echo(self, index: int, call: Call) -> str:
        return call.texts[index // call.works[0].params.n] if call.texts else ""

    def choice(self, index: int, generation: Generation, call: Call) -> dict[str, Any]:
        """One text."""
        text = self._echo(index, call) + self.text_of(generation, generation.finish)
        logprobs = self._logprobs(generation, call, slice(None))
        return {"index": index, "text": text, "logprobs": logprobs, **self.ending(generation.finish)}

    def delta(self, index: int, generation: Generation, call: Call, seen: _Seen) -> dict[str, Any]:
        """New text; the echoed prompt with the first."""
        finish = generation.finish
        count = len(generation.output_ids)
        text, tokens = seen.advance(self.text_of(generation, finish), count)
        if not seen.begun:
            text = self._echo(index, call) + text
        seen.begun = True
        logprobs = self._logprobs(generation, call, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, **self.ending(finish)}

    def _logprobs(self, generation: Generation, call: Call, part: slice) -> dict[str, Any] | None:
        if call.top is None:
            return None
        chosen = list(zip(generation.output_logprobs, generation.output_ids, strict=False))[part]
        texts = [text for text, _ in self.token_texts(chosen)]
        best = [dict(self.token_texts(top)) for top in generation.output_top[part]]
        offsets = [sum(len(text) for text in texts[:at]) for at in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for logprob, _ in chosen],
            "top_logprobs": best or None,
            "text_offset": offsets,
        }


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _token_entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _sampling(raw: dict[str, Any]) -> SamplingParams:
    fields = {name: raw[name] for name in _SAME if raw.get(name) is not None}
    fields |= {own: raw[name] for name, own in _RENAMED.items() if raw.get(name) is not None}
    return parse_sampling_params(fields, where="the request")


def _filling(params: SamplingParams, *, room: int) -> SamplingParams:
    """OpenAI's default: without a limit, the output may fill the context."""
    if params.max_new_tokens is not None or room <= 0:
        return params
    return replace(params, max_new_tokens=room)


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}: it must be true or false")
    return bool(value)


def _count(raw: dict[str, Any], name: str) -> int:
    value = raw.get(name) or 0
    if type(value) is not int or not 0 <= value <= _MAX_TOP_LOGPROBS:
        raise InvalidRequest(f"{name} is {value!r}: it must be a whole number in [0, {_MAX_TOP_LOGPROBS}]")
    return value


def _usage(generations: list[Generation], call: Call) -> dict[str, Any]:
    prompt = sum(len(work.prompt_ids) for work in call.works)
    completion = sum(len(generation.output_ids) for generation in generations)
    cached = sum(generation.cached_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
