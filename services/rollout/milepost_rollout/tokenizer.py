"""Text <-> token ids of one model folder, without torch: `tokenizer.json` and the folder's chat template.

Text prompts are encoded as the tokenizer's own post-processor wants them (a beginning-of-sequence token where
the model has one); a conversation is first rendered by the chat template, which writes special tokens itself.
Model output is decoded for rewards and transcripts alone; it is never encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from milepost.errors import InvalidArgument
from milepost.types import ChatMessage, Int32Array

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PROBE = (
    ChatMessage(role="user", content="question"),
    ChatMessage(role="assistant", content="milepost-answer"),
)


class Tokenizer:
    """The tokenizer of a model folder; stateless, safe to share.

    Args:
      fast: the `tokenizers` object.
      template: Jinja source of the chat template; None where the model has none.
      specials: special tokens by name, for the template.
      source: where it came from, for error messages.
    """

    def __init__(
        self, fast: FastTokenizer, *, template: str | None, specials: Mapping[str, str], source: str
    ) -> None:
        self._fast = fast
        self._specials = dict(specials)
        self._source = source
        self._template: Template | None = None
        if template is not None:
            self._template = _compile(template, source)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Loads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a folder.

        Raises:
          InvalidArgument: there is no `tokenizer.json`, or a file cannot be read; names file and remedy.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidArgument(
                f"rollout.tokenizer {str(folder)!r}: there is no file tokenizer.json in it; save "
                "the model's tokenizer there (AutoTokenizer.from_pretrained(it).save_pretrained(folder))",
                reason="BAD_TOKENIZER",
            )
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise InvalidArgument(
                f"rollout.tokenizer {str(path)!r}: {error}; save it again", reason="BAD_TOKENIZER"
            ) from error
        fast.no_truncation()
        fast.no_padding()
        config = _config(folder)
        return cls(
            fast, template=_template_of(folder, config), specials=_specials(config), source=str(folder)
        )

    def encode(self, text: str, *, special: bool = True) -> Int32Array:
        """Token ids of a text, int32 [num_tokens]; `special` lets the post-processor add its tokens."""
        return np.array(self._fast.encode(text, add_special_tokens=special).ids, dtype=np.int32)

    def decode(self, ids: Int32Array, *, skip_special: bool = True) -> str:
        """Text of token ids."""
        return self._fast.decode(ids.tolist(), skip_special_tokens=skip_special)

    def render(self, messages: Sequence[ChatMessage], *, generate: bool = True) -> str:
        """Applies the chat template; `generate` ends it with the start of the model's turn.

        Raises:
          InvalidArgument: the model has no template, or the template refuses the messages.
        """
        if self._template is None:
            raise InvalidArgument(
                f"messages: the tokenizer in {self._source!r} has no chat template; add "
                "chat_template.jinja to it, or put prompts as text or input_ids",
                reason="NO_CHAT_TEMPLATE",
            )
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=generate, **self._specials)
        except (TemplateError, TypeError, ValueError) as error:
            raise InvalidArgument(
                f"messages: the chat template of {self._source!r} refuses them: {error}; mend the messages",
                reason="BAD_MESSAGES",
            ) from error

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Int32Array:
        """Token ids of a conversation with the start of the model's turn at its end."""
        return self.encode(self.render(messages), special=False)

    def encode_turn(self, messages: Sequence[ChatMessage], *, last_token: int) -> Int32Array:
        """Token ids that come between one turn of the model and the next; what it wrote is not touched.

        The template is rendered with and without the new messages after a made-up answer; what the second
        text lacks is what the model did not write: the end of its turn, the messages, the start of its next
        turn. The end of turn is left out where `last_token`, the model's last, is it already.

        Raises:
          InvalidArgument: the template rewrites earlier turns, so that nothing can be appended.
        """
        answered = self.render(_PROBE, generate=False)
        continued = self.render((*_PROBE, *messages), generate=True)
        end = answered.rfind(_PROBE[1].content) + len(_PROBE[1].content)
        if not continued.startswith(answered[:end]):
            raise InvalidArgument(
                f"the chat template of {self._source!r} rewrites earlier turns when messages follow; use "
                "a template that only appends",
                reason="BAD_CHAT_TEMPLATE",
            )
        between = continued[end:]
        written = self._fast.decode([last_token], skip_special_tokens=False)
        if written and between.startswith(written):
            between = between[len(written) :]
        return self.encode(between, special=False)


# ---------------------------------------------------------------------------------------------- files


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InvalidArgument(
            f"rollout.tokenizer: {path} is not JSON ({error}); mend it", reason="BAD_TOKENIZER"
        ) from error


def _template_of(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {t["name"]: t["template"] for t in cast(list[dict[str, str]], given)}
        return named.get("default")
    return given


def _specials(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL:
        token = config.get(name)
        if isinstance(token, dict):
            token = cast(dict[str, Any], token).get("content")
        if isinstance(token, str):
            found[name] = token
    return found


# ---------------------------------------------------------------------------------------------- templates


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the model wrote; here it is passed through."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replaces the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _compile(source: str, where: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _refuse, "strftime_now": _now}
    environment.globals.update(helpers)
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise InvalidArgument(
            f"rollout.tokenizer {where!r}: the chat template cannot be compiled ({error}); mend it",
            reason="BAD_TOKENIZER",
        ) from error
