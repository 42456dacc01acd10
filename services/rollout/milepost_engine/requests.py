"""Reading `/generate` bodies: one prompt or many, as text or tokens, into checked per-prompt work.

Pure but for the tokenizer. Errors name the field, its value and the remedy. Fields of SGLang's request that
change what is computed and that this engine lacks are refused; the rest (routing, tracing, priorities) is
ignored, as SGLang ignores what it does not know.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass
from typing import Any, cast

import orjson

from milepost_engine.errors import InvalidRequest
from milepost_engine.generation import Generation, Listener, LogprobOptions
from milepost_engine.params import SamplingParams, parse_sampling_params
from milepost_engine.text import Text

_DEFAULT_NEW_TOKENS = 128
_PROCESS = uuid.uuid4().hex[:20]
_COUNTER = itertools.count()
_MAX_TOP_LOGPROBS = 128
_UNSUPPORTED = (
    "image_data",
    "video_data",
    "audio_data",
    "input_embeds",
    "lora_path",
    "session_params",
    "custom_logit_processor",
    "token_ids_logprob",
    "return_hidden_states",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model can take.

    Attributes:
        context_length: Tokens of prompt and output together.
        vocab_size: Token ids lie below this.
        eos_ids: End-of-sequence tokens.
    """

    context_length: int
    vocab_size: int
    eos_ids: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptWork:
    """One prompt, checked.

    Attributes:
        rid: Request id; its samples are `rid`, or `rid_<i>` when there are several.
        prompt_ids: Tokens.
        params: Sampling parameters.
        logprobs: Which log-probs to report.
        max_new_tokens: Limit after the context.
    """

    rid: str
    prompt_ids: list[int]
    params: SamplingParams
    logprobs: LogprobOptions
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateWork:
    """One `/generate` call, checked.

    Attributes:
        prompts: In the order of the body.
        single: The reply is one object instead of a list (one prompt, one sample).
        stream: Server-sent events.
        text_in_logprobs: Token texts are reported beside token ids.
    """

    prompts: list[PromptWork]
    single: bool
    stream: bool
    text_in_logprobs: bool


def parse_object(body: bytes) -> dict[str, Any]:
    """Decodes a JSON object.

    Raises:
        InvalidRequest: It is none.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is a JSON {type(value).__name__}: send an object")
    return cast(dict[str, Any], value)


def parse_generate(raw: dict[str, Any], *, limits: Limits, text: Text) -> GenerateWork:
    """Checks the body of `/generate`.

    Raises:
        InvalidRequest: Something in it cannot be served.
    """
    for name in _UNSUPPORTED:
        if raw.get(name):
            raise InvalidRequest(f"{name} is not supported by this engine: leave it out")
    prompts, batched = _prompts(raw, limits, text)
    count = len(prompts)
    params = [
        parse_sampling_params(value, where=f"sampling_params{where}")
        for value, where in _each(raw, "sampling_params", count, None)
    ]
    logprobs = _logprob_options(raw, count, prompts)
    rids = _rids(raw.get("rid"), count, batched=batched)
    works = [
        prompt_work(rid, ids, p, options, limits=limits)
        for rid, ids, p, options in zip(rids, prompts, params, logprobs, strict=True)
    ]
    return GenerateWork(
        prompts=works,
        single=not batched and works[0].params.n == 1,
        stream=_bool(raw, "stream"),
        text_in_logprobs=_bool(raw, "return_text_in_logprobs"),
    )


def prompt_work(
    rid: str, ids: list[int], params: SamplingParams, logprobs: LogprobOptions, *, limits: Limits
) -> PromptWork:
    """Fits one prompt into the context.

    Raises:
        InvalidRequest: The prompt is empty, too long, or holds something that is no token of the model.
    """
    if not ids:
        raise InvalidRequest("input_ids is empty: send at least one token")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < limits.vocab_size)
        raise InvalidRequest(
            f"input_ids holds {wrong!r}: token ids must be whole numbers in [0, {limits.vocab_size})"
        )
    room = limits.context_length - len(ids)
    if room <= 0:
        raise InvalidRequest(
            f"input_ids: The input ({len(ids)} tokens) is longer than the model's context length "
            f"({limits.context_length} tokens): shorten the prompt, or start the engine with a longer context"
        )
    if params.max_new_tokens is not None and params.max_new_tokens > room:
        raise InvalidRequest(
            f"max_new_tokens is {params.max_new_tokens}, which with {len(ids)} prompt tokens exceeds the "
            f"model's context length of {limits.context_length} tokens: ask for at most {room}"
        )
    wrong = [i for i in (*params.logit_bias, *params.stop_token_ids) if i >= limits.vocab_size]
    if wrong:
        raise InvalidRequest(f"token id {wrong[0]} lies outside the vocabulary of {limits.vocab_size} tokens")
    limit = min(_DEFAULT_NEW_TOKENS, room) if params.max_new_tokens is None else params.max_new_tokens
    return PromptWork(rid=rid, prompt_ids=ids, params=params, logprobs=logprobs, max_new_tokens=limit)


def generations(
    work: PromptWork, *, limits: Limits, text: Text, stream: bool, listener: Listener
) -> list[Generation]:
    """The samples of one prompt, ready to be submitted."""
    params = work.params
    stop_ids = frozenset() if params.ignore_eos else limits.eos_ids.union(params.stop_token_ids)
    return [
        Generation(
            rid=work.rid if params.n == 1 else f"{work.rid}_{index}",
            prompt_ids=work.prompt_ids,
            params=params.for_sample(index),
            logprobs=work.logprobs,
            max_new_tokens=work.max_new_tokens,
            stop_ids=stop_ids,
            stream=stream,
            listener=listener,
            stop_strings=text.stop_strings(params),
        )
        for index in range(params.n)
    ]


def new_rid() -> str:
    """A request id nobody else has."""
    return f"{_PROCESS}{next(_COUNTER):012x}"


def _prompts(raw: dict[str, Any], limits: Limits, text: Text) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether the body holds a list of prompts."""
    given, ids = raw.get("text"), raw.get("input_ids")
    if (given is None) == (ids is None):
        raise InvalidRequest("exactly one of text and input_ids must be given")
    if given is not None:
        if isinstance(given, str):
            return [text.encode(given)], False
        if not isinstance(given, list) or not given or not all(isinstance(item, str) for item in given):
            raise InvalidRequest(f"text is {type(given).__name__}: it must be a string or a list of strings")
        return [text.encode(item) for item in cast(list[str], given)], True
    if not isinstance(ids, list) or not ids:
        raise InvalidRequest(f"input_ids is {ids!r}: it must be a list of token ids, or a list of such lists")
    if not isinstance(ids[0], list):
        return [cast(list[int], ids)], False
    if not all(isinstance(item, list) for item in ids):
        raise InvalidRequest("input_ids mixes lists and token ids: send one prompt or a list of prompts")
    return cast(list[list[int]], ids), True


def _each(raw: dict[str, Any], name: str, count: int, default: Any) -> list[tuple[Any, str]]:
    """A field that is one value for all prompts or a list with one for each, with the path errors name."""
    value = raw.get(name)
    if not isinstance(value, list):
        return [(default if value is None else value, "")] * count
    if len(value) != count:
        raise InvalidRequest(
            f"{name} has {len(value)} entries for {count} prompts: send one, or one for each"
        )
    return [(default if item is None else item, f"[{i}]") for i, item in enumerate(cast(list[Any], value))]


def _logprob_options(raw: dict[str, Any], count: int, prompts: list[list[int]]) -> list[LogprobOptions]:
    wanted = _each(raw, "return_logprob", count, False)
    starts = _each(raw, "logprob_start_len", count, -1)
    tops = _each(raw, "top_logprobs_num", count, 0)
    options: list[LogprobOptions] = []
    for (want, w1), (start, w2), (top, w3), ids in zip(wanted, starts, tops, prompts, strict=True):
        if not isinstance(want, bool):
            raise InvalidRequest(f"return_logprob{w1} is {want!r}: it must be true or false")
        if type(start) is not int or not -1 <= start <= len(ids):
            raise InvalidRequest(f"logprob_start_len{w2} is {start!r}: it must lie in [-1, {len(ids)}]")
        if type(top) is not int or not 0 <= top <= _MAX_TOP_LOGPROBS:
            raise InvalidRequest(f"top_logprobs_num{w3} is {top!r}: it must lie in [0, {_MAX_TOP_LOGPROBS}]")
        options.append(LogprobOptions(wanted=want, start_len=start, top=top))
    return options


def _rids(value: object, count: int, *, batched: bool) -> list[str]:
    if value is None:
        return [new_rid() for _ in range(count)]
    if isinstance(value, str) and value:
        return [f"{value}_{index}" for index in range(count)] if batched else [value]
    if isinstance(value, list) and all(isinstance(v, str) and v for v in value):
        rids = cast(list[str], value)
        if len(rids) == len(set(rids)) == count:
            return rids
    raise InvalidRequest(f"rid is {value!r}: it must be a string, or a list of {count} different ones")


def _bool(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r}: it must be true or false")
    return bool(value)
