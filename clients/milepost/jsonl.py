"""Prompts from JSONL: one JSON object a line becomes one `Prompt`.

    {"prompt": "17+25=", "label": "42"} {"prompt_id": "a", "messages": [{"role": "user", "content": "hi"}],
    "metadata": {"level": 3}, "reward": "exact"} {"input_ids": [1, 2, 3], "sampling": {"temperature": 0.7,
    "max_new_tokens": 64}}

Exactly one of `prompt`, `messages` and `input_ids`; everything else is optional. A prompt without an id is
called `<dataset>/<epoch>/<index>`, index being the number of the line from 0, so that a file read twice names
its prompts alike. A line that cannot be used is an `InvalidArgument` that names line, field, value and
remedy, and the lines after it go on.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from milepost.errors import InvalidArgument
from milepost.types import ChatMessage, Int32Array, Prompt, SamplingParams

FIELDS = ("prompt_id", "prompt", "messages", "input_ids", "label", "metadata", "reward", "sampling")
INPUTS = ("prompt", "messages", "input_ids")
MAX_ID_BYTES = 512
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one line of a file gave: a prompt, or the reason why there is none."""

    number: int
    """From 1."""
    prompt: Prompt | None = None
    error: InvalidArgument | None = None


def read_file(path: str | Path, *, dataset: str | None = None, epoch: int = 0) -> Iterator[Line]:
    """Reads the prompts of a file, line by line.

    Args:
      path: the file, UTF-8.
      dataset: first part of default ids; by default the file's name without its suffix.
      epoch: second part of default ids.

    Yields:
      One `Line` for each line that is not blank.

    Raises:
      OSError: the file cannot be opened.
    """
    path = Path(path)
    with path.open("rb") as file:
        yield from read_lines(file, dataset=dataset or path.stem, epoch=epoch)


def read_lines(lines: Iterable[bytes | str], *, dataset: str, epoch: int = 0) -> Iterator[Line]:
    """Reads prompts from lines; see `read_file`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = parse_line(line, number=number, default_id=f"{dataset}/{epoch}/{number - 1}")
        except InvalidArgument as error:
            yield Line(number=number, error=error)
        else:
            yield Line(number=number, prompt=prompt)


def parse_line(line: bytes | str, *, number: int, default_id: str) -> Prompt:
    """Turns one line into a prompt.

    Args:
      line: a JSON object.
      number: its number from 1, for error messages.
      default_id: the prompt's id where the line gives none.

    Raises:
      InvalidArgument: names line, field, value and remedy.
    """
    try:
        return _prompt(_parse(line), default_id)
    except _Wrong as wrong:
        metadata = {"line": str(number), "field": wrong.field}
        raise InvalidArgument(
            f"line {number}: {wrong}", reason="MALFORMED_PROMPT", metadata=metadata
        ) from None


class _Wrong(Exception):
    """A field that cannot be used."""

    def __init__(self, field: str, value: Any, wanted: str, remedy: str) -> None:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN] + "..."
        super().__init__(f"{field} is {shown!r}, wanted {wanted}; {remedy}")
        self.field = field


def _parse(line: bytes | str) -> dict[str, Any]:
    try:
        text = line.decode() if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise _Wrong("the line", repr(line[:20]), f"UTF-8 ({error})", "save the file as UTF-8") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        wanted = f"one JSON object ({error.msg} at column {error.colno})"
        remedy = "write one object a line, strings in double quotes"
        raise _Wrong("the line", text.strip(), wanted, remedy) from None
    except ValueError as error:  # NaN and Infinity, and numbers of thousands of digits
        raise _Wrong("the line", text.strip(), f"JSON ({error})", "write finite numbers") from None
    except RecursionError:
        raise _Wrong("the line", text.strip(), "a JSON object", "nest it less deeply") from None
    if not isinstance(value, dict):
        raise _Wrong("the line", value, "a JSON object", 'write {"prompt": ...}')
    return cast(dict[str, Any], value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _prompt(fields: dict[str, Any], default_id: str) -> Prompt:
    for name in fields:
        if name not in FIELDS:
            raise _unknown(name, fields[name], FIELDS)
    given = [name for name in INPUTS if fields.get(name) is not None]
    if len(given) != 1:
        both = " and ".join(given) or "none of them"
        raise _Wrong("input", both, f"exactly one of {', '.join(INPUTS)}", "keep one of them")
    return Prompt(
        prompt_id=_prompt_id(fields.get("prompt_id"), default_id),
        text=_text(fields["prompt"]) if given == ["prompt"] else None,
        messages=_messages(fields["messages"]) if given == ["messages"] else None,
        input_ids=_input_ids(fields["input_ids"]) if given == ["input_ids"] else None,
        label=_label(fields.get("label")),
        metadata_json=_metadata(fields.get("metadata")),
        sampling=_sampling(fields.get("sampling")),
        reward=_reward(fields.get("reward")),
    )


def _unknown(name: str, value: Any, known: Iterable[str], prefix: str = "") -> _Wrong:
    near = difflib.get_close_matches(name, list(known), n=1)
    remedy = f"did you mean {near[0]!r}?" if near else "remove it, or put it into metadata"
    return _Wrong(prefix + name, value, f"one of the fields {', '.join(known)}", remedy)


def _prompt_id(value: Any, default_id: str) -> str:
    if value is None:
        return default_id
    if not isinstance(value, str) or not 1 <= len(value.encode()) <= MAX_ID_BYTES:
        raise _Wrong(
            "prompt_id", value, f"a string of 1 to {MAX_ID_BYTES} bytes", "shorten it, or leave it out"
        )
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _Wrong("prompt", value, "a string that is not empty", "put a conversation into messages")
    return value


def _messages(value: Any) -> tuple[ChatMessage, ...]:
    if not isinstance(value, list) or not value:
        raise _Wrong("messages", value, "a list of messages", 'write [{"role": "user", "content": "..."}]')
    return tuple(_message(i, m) for i, m in enumerate(cast(list[Any], value)))


def _message(index: int, value: Any) -> ChatMessage:
    name = f"messages[{index}]"
    if not isinstance(value, dict):
        raise _Wrong(name, value, "an object", 'write {"role": "user", "content": "..."}')
    message = cast(dict[str, Any], value)
    for key in message:
        if key not in ("role", "content"):
            raise _unknown(key, message[key], ("role", "content"), f"{name}.")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise _Wrong(
                f"{name}.{key}", message.get(key), "a string", "give every message a role and a content"
            )
    return ChatMessage(role=message["role"], content=message["content"])


def _input_ids(value: Any) -> Int32Array:
    if not isinstance(value, list) or not value:
        raise _Wrong("input_ids", value, "a list of token ids that is not empty", "write [1, 2, 3]")
    for i, token in enumerate(cast(list[Any], value)):
        if type(token) is not int or not 0 <= token < 2**31:
            raise _Wrong(
                f"input_ids[{i}]", token, "a whole number from 0 to 2147483647", "use the tokenizer's ids"
            )
    return np.array(value, dtype=np.int32)


def _label(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise _Wrong("label", value, "a string or a number", "put anything else into metadata")
    return str(value)


def _metadata(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, dict):
        raise _Wrong("metadata", value, "an object", 'write {"name": value}')
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _reward(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Wrong(
            "reward", value, "a reward's name", 'write "exact", "math", "regex:PATTERN" or "module:function"'
        )
    return value


# ---------------------------------------------------------------------------------------------- sampling


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(s, str) and s for s in cast(list[Any], value))


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(i) and 0 <= i < 2**31 for i in cast(list[Any], value))


_SAMPLING: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0 to 100", lambda v: _is_number(v) and 0 <= v <= 100),
    "top_p": ("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1),
    "top_k": ("a whole number from 1, or -1", lambda v: _is_count(v) and (1 <= v < 2**31 or v == -1)),
    "min_p": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "max_new_tokens": ("a whole number from 1", lambda v: _is_count(v) and 1 <= v < 2**31),
    "stop": ("a list of strings", _strings),
    "stop_token_ids": ("a list of token ids", _token_ids),
    "seed": ("a whole number from 0", lambda v: _is_count(v) and 0 <= v < 2**64),
    "ignore_eos": ("true or false", lambda v: isinstance(v, bool)),
}


def _sampling(value: Any) -> SamplingParams | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise _Wrong("sampling", value, "an object", 'write {"temperature": 1.0}')
    params = {name: v for name, v in cast(dict[str, Any], value).items() if v is not None}
    for name, v in params.items():
        if name not in _SAMPLING:
            raise _unknown(name, v, _SAMPLING, "sampling.")
        wanted, fits = _SAMPLING[name]
        if not fits(v):
            raise _Wrong(f"sampling.{name}", v, wanted, "change it, or leave it out for the run's value")
    for name in ("stop", "stop_token_ids"):
        if name in params:
            params[name] = tuple(params[name])
    return SamplingParams(**params)
