"""Sampling parameters: what a caller may ask of the sampler, checked field by field.

Pure: no torch, no model. Names, defaults and meanings are those of SGLang's `sampling_params` object. A name
that SGLang knows and this engine cannot honour is refused by that name; so is a name nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, cast

from milepost_engine.errors import InvalidRequest

TOP_K_ALL = 1 << 30
MAX_SAMPLES_PER_PROMPT = 4096
_GREEDY_BELOW = 1e-6
_UNSUPPORTED = frozenset(
    {"json_schema", "regex", "ebnf", "structural_tag", "stop_regex", "custom_params", "beam_width"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Attributes:
        max_new_tokens: Tokens to generate at most; None takes 128, or what the context leaves.
        min_new_tokens: End-of-sequence and stop tokens are masked until so many tokens stand.
        temperature: 0 means greedy, with log-probs at temperature 1.
        top_p: Nucleus mass in (0, 1].
        top_k: Candidates kept; TOP_K_ALL keeps all (-1 on the wire).
        min_p: Candidates below this share of the best one's probability are dropped.
        stop: Strings that end the text.
        stop_token_ids: Tokens that end the output, besides the model's own end-of-sequence tokens.
        ignore_eos: Only `max_new_tokens` and stop strings end the output.
        n: Samples per prompt.
        sampling_seed: Makes the draw reproducible; sample i of n uses seed + i.
        skip_special_tokens, spaces_between_special_tokens, no_stop_trim: How the text is decoded.
        frequency_penalty, presence_penalty, repetition_penalty: Over output tokens, before the temperature.
        logit_bias: Added to the logits of the given token ids, before the temperature.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = TOP_K_ALL
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])

    @property
    def greedy(self) -> bool:
        """The most likely token is taken; nothing is drawn."""
        return self.temperature < _GREEDY_BELOW or self.top_k == 1

    @property
    def logprob_temperature(self) -> float:
        """The temperature of the distribution whose log-probs are reported."""
        return 1.0 if self.temperature < _GREEDY_BELOW else self.temperature

    @property
    def penalised(self) -> bool:
        """Logits depend on the tokens generated so far."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0

    def for_sample(self, index: int) -> SamplingParams:
        """The parameters of sample `index` of n: the same, with a seed of its own."""
        if self.sampling_seed is None or index == 0:
            return self
        return replace(self, sampling_seed=self.sampling_seed + index)


def parse_sampling_params(raw: object, *, where: str = "sampling_params") -> SamplingParams:
    """Checks one `sampling_params` object of a request.

    Args:
        raw: The decoded JSON value; None means all defaults.
        where: The path that errors name.

    Raises:
        InvalidRequest: A field is unknown, unsupported, of the wrong type or out of range.
    """
    if raw is None:
        return SamplingParams()
    if not isinstance(raw, dict):
        raise InvalidRequest(f"{where} is {type(raw).__name__}: send an object such as {{'temperature': 1}}")
    known: dict[str, Any] = {}
    for name, value in cast(dict[str, object], raw).items():
        parser = _PARSERS.get(name)
        if parser is None:
            raise InvalidRequest(_unknown(name, where))
        if value is not None:
            known[name] = parser(f"{where}.{name}", value)
    params = SamplingParams(**known)
    _check_together(params, where)
    return params


def _unknown(name: str, where: str) -> str:
    if name in _UNSUPPORTED:
        return f"{where}.{name} is not supported by this engine: leave it out"
    near = get_close_matches(name, list(_PARSERS), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(sorted(_PARSERS))}"
    return f"{where}.{name} is unknown: {hint}"


def _check_together(params: SamplingParams, where: str) -> None:
    if params.max_new_tokens is not None and params.min_new_tokens > params.max_new_tokens:
        raise InvalidRequest(
            f"{where}.min_new_tokens is {params.min_new_tokens}, above max_new_tokens "
            f"{params.max_new_tokens}: lower it"
        )


def _number(low: float, high: float, *, above_low: bool = False) -> Callable[[str, object], float]:
    interval = f"{'(' if above_low else '['}{low:g}, {high:g}]"

    def parse(where: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise InvalidRequest(f"{where} is {value!r}: it must be a number in {interval}")
        if not low <= value <= high or (above_low and value == low):
            raise InvalidRequest(f"{where} is {value!r}: it must lie in {interval}")
        return float(value)

    return parse


def _integer(low: int, high: int) -> Callable[[str, object], int]:
    def parse(where: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequest(f"{where} is {value!r}: it must be a whole number")
        if not low <= value <= high:
            raise InvalidRequest(f"{where} is {value}: it must lie in [{low}, {high}]")
        return value

    return parse


def _top_k(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InvalidRequest(f"{where} is {value!r}: it must be a whole number of at least 1, or -1 for all")
    return TOP_K_ALL if value == -1 else value


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where} is {value!r}: it must be true or false")
    return value


def _strings(where: str, value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequest(f"{where} is {value!r}: it must be a non-empty string or a list of them")
    return tuple(cast(list[str], items))


def _token_ids(where: str, value: object) -> tuple[int, ...]:
    items = [value] if isinstance(value, int) else value
    if not isinstance(items, list) or not all(type(item) is int and item >= 0 for item in items):
        raise InvalidRequest(f"{where} is {value!r}: it must be a list of token ids")
    return tuple(cast(list[int], items))


def _bias(where: str, value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} is {value!r}: it must map token ids to numbers")
    one = _number(-100.0, 100.0)
    parsed: dict[int, float] = {}
    for key, bias in cast(dict[str, object], value).items():
        if not key.isdecimal():
            raise InvalidRequest(f"{where} has the key {key!r}: keys must be token ids")
        parsed[int(key)] = one(f"{where}[{key}]", bias)
    return parsed


_PARSERS: dict[str, Callable[[str, object], Any]] = {
    "max_new_tokens": _integer(0, 1 << 31),
    "min_new_tokens": _integer(0, 1 << 31),
    "temperature": _number(0.0, 1e4),
    "top_p": _number(0.0, 1.0, above_low=True),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": _flag,
    "n": _integer(1, MAX_SAMPLES_PER_PROMPT),
    "sampling_seed": _integer(-(1 << 62), 1 << 62),
    "skip_special_tokens": _flag,
    "spaces_between_special_tokens": _flag,
    "no_stop_trim": _flag,
    "frequency_penalty": _number(-2.0, 2.0),
    "presence_penalty": _number(-2.0, 2.0),
    "repetition_penalty": _number(0.0, 2.0, above_low=True),
    "logit_bias": _bias,
}
