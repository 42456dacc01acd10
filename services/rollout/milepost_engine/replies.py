"""The shape of `/generate` replies: SGLang's, field by field.

    {"text": str, "output_ids": [int],
     "meta_info": {"id", "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens",
                   "weight_version", "weight_versions"?, "e2e_latency"?, "input_token_logprobs"?,
                   "output_token_logprobs"?, "input_top_logprobs"?, "output_top_logprobs"?}}

`text` is absent without a tokenizer. Log-prob entries are `[logprob, token_id, text or null]`. Spans (0.5.19
on) are in finished replies. A chunk of a stream is such a reply over the tokens so far, `finish_reason` null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from milepost_engine.generation import FinishReason, Generation, TopEntry, version_spans
from milepost_engine.text import Text


@dataclass(frozen=True, slots=True)
class ReplyStyle:
    """What replies of this engine and request look like.

    Attributes:
        text: The tokenizer.
        spans: Finished replies carry version spans.
        token_texts: Log-prob entries carry token texts.
    """

    text: Text
    spans: bool
    token_texts: bool = False


def render(generation: Generation, style: ReplyStyle, *, version: str) -> dict[str, Any]:
    """The reply, or chunk, for what a generation holds now.

    Args:
        generation: May still be growing.
        style: Of the engine and the request.
        version: The engine's weight version, for an output that goes on.
    """
    finish = generation.finish  # first: once it is set, the tokens are complete
    ids = list(generation.output_ids)
    matched = finish.matched if finish else None
    reply: dict[str, Any] = {}
    if style.text.available:
        reply["text"] = style.text.output(ids, generation.params, matched=matched, ended=finish is not None)
    reply["output_ids"] = ids
    current = generation.final_version if finish and generation.final_version else version
    reply["meta_info"] = _meta(generation, style, ids, finish, current)
    return reply


def _meta(
    generation: Generation, style: ReplyStyle, ids: list[int], finish: FinishReason | None, current: str
) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": finish.to_json() if finish else None,
        "prompt_tokens": len(generation.prompt_ids),
        "completion_tokens": len(ids),
        "cached_tokens": generation.cached_tokens,
        "weight_version": current,
    }
    if finish:
        meta["e2e_latency"] = generation.finished_s - generation.created_s
        if style.spans:
            meta["weight_versions"] = version_spans(generation.version_marks, current, len(ids))
    if generation.logprobs.wanted:
        meta |= _logprobs(generation, style, ids)
    return meta


def _logprobs(generation: Generation, style: ReplyStyle, ids: list[int]) -> dict[str, Any]:
    def entry(logprob: float | None, token: int) -> list[Any]:
        return [logprob, token, style.text.token(token) if style.token_texts else None]

    def best(entries: TopEntry | None) -> list[list[Any]] | None:
        return None if entries is None else [entry(logprob, token) for logprob, token in entries]

    options = generation.logprobs
    prompt = generation.prompt_ids[options.start_len :] if options.of_input else []
    values = generation.input_logprobs or []
    fields: dict[str, Any] = {
        "input_token_logprobs": [entry(v, t) for v, t in zip(values, prompt, strict=False)],
        "output_token_logprobs": [entry(v, t) for v, t in zip(generation.output_logprobs, ids, strict=False)],
    }
    if options.top:
        fields["input_top_logprobs"] = [best(entries) for entries in generation.input_top or []]
        fields["output_top_logprobs"] = [best(entries) for entries in generation.output_top[: len(ids)]]
    return fields
