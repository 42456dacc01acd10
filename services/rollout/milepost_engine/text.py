"""Between text and tokens: a Hugging Face tokenizer, and the search for stop strings in a growing output.

Decoding happens on the event loop when a reply is made; the scheduler thread only decodes the tail of outputs
that have stop strings. Fast tokenizers are safe to use from both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from milepost_engine.errors import InvalidRequest
from milepost_engine.params import SamplingParams

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TAIL_SLACK = 8


class Text:
    """A tokenizer, or the lack of one.

    Args:
        tokenizer: A Hugging Face tokenizer; None under `skip_tokenizer_init`.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: Path) -> Text:
        """Loads the tokenizer of a model folder."""
        return cls(AutoTokenizer.from_pretrained(path, local_files_only=True))

    @property
    def available(self) -> bool:
        """Text can be read and written."""
        return self._tokenizer is not None

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's end-of-sequence token."""
        return None if self._tokenizer is None else self._tokenizer.eos_token_id

    def _require(self, what: str) -> Any:
        if self._tokenizer is None:
            raise InvalidRequest(
                f"{what} needs a tokenizer, and this engine runs without one: send input_ids"
            )
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds."""
        return list(self._require("text").encode(text))

    def render_chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """Tokens of a conversation under the model's chat template.

        Raises:
            InvalidRequest: There is no template, or it does not accept these messages.
        """
        tokenizer = self._require("messages")
        if not tokenizer.chat_template:
            raise InvalidRequest(
                "messages cannot be rendered: the tokenizer has no chat template; use /v1/completions"
            )
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # a template is a program of its author's: it may raise anything
            raise InvalidRequest(f"messages do not fit the chat template: {error}") from error
        return list(tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int], params: SamplingParams) -> str:
        """Text of output tokens."""
        return self._require("text").decode(
            list(ids),
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )

    def token(self, token_id: int) -> str:
        """Text of one token by itself, special or not."""
        return self._require("return_text_in_logprobs").decode([token_id])

    def output(
        self, ids: Sequence[int], params: SamplingParams, *, matched: int | str | None, ended: bool
    ) -> str:
        """Text of an output as a reply shows it: what stopped it is cut off unless `no_stop_trim`.

        Args:
            ids: Output tokens, the stop token included.
            params: The request's.
            matched: The token or string that ended it.
            ended: The output is complete; else a character that is not complete yet is held back.
        """
        if isinstance(matched, int) and not params.no_stop_trim:
            ids = ids[:-1]
        text = self.decode(ids, params)
        if isinstance(matched, str) and not params.no_stop_trim:
            found = text.find(matched)
            text = text[:found] if found >= 0 else text
        return text if ended else text.rstrip(_REPLACEMENT)

    def stop_strings(self, params: SamplingParams) -> TailSearch | None:
        """The search for a request's stop strings."""
        if not params.stop:
            return None
        self._require("stop")
        return TailSearch(self, params)


class TailSearch:
    """Looks for stop strings in the tail that the newest token can have completed.

    Args:
        text: The tokenizer.
        params: With at least one stop string.
    """

    def __init__(self, text: Text, params: SamplingParams) -> None:
        self._text = text
        self._params = params
        # A stop string of k characters is spelled by at most 4k byte tokens; the slack keeps merges at the
        # edge of the tail from changing how its end reads.
        self._tail = 4 * max(len(stop) for stop in params.stop) + _TAIL_SLACK

    def match(self, output_ids: list[int]) -> str | None:
        """The first of the request's stop strings that the text now holds."""
        tail = self._text.decode(output_ids[-self._tail :], self._params)
        return next((stop for stop in self._params.stop if stop in tail), None)
