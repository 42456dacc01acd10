"""Text to tokens and back, and what chat templates make of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from milepost.errors import InvalidArgument
from milepost.types import ChatMessage
from milepost_rollout.tokenizer import Tokenizer

CHAT = (ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="1+1?"))


def test_text_and_back(tokenizer: Tokenizer):
    ids = tokenizer.encode("12+5=")
    assert ids.dtype.name == "int32"
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "12+5="


def test_special_tokens_are_left_out_of_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("a<|end|>", special=False)
    assert len(ids) == 2
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "a<|end|>"


def test_a_conversation_ends_with_the_models_turn(tokenizer: Tokenizer):
    text = tokenizer.render(CHAT)
    assert text == "<|start|>system\nbe brief<|end|>\n<|start|>user\n1+1?<|end|>\n<|start|>assistant\n"
    assert tokenizer.decode(tokenizer.encode_chat(CHAT), skip_special=False) == text


def test_it_agrees_with_transformers(tokenizer: Tokenizer, tokenizer_folder: Path):
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    messages = [{"role": m.role, "content": m.content} for m in CHAT]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(CHAT).tolist() == expected
    assert tokenizer.encode("7*6=").tolist() == theirs("7*6=")["input_ids"]


@pytest.mark.parametrize("ended, wanted", [(True, "\n"), (False, "<|end|>\n")])
def test_a_turn_closes_what_the_model_did_not_close(tokenizer: Tokenizer, ended: bool, wanted: str):
    wrote = tokenizer.encode("42<|end|>" if ended else "42", special=False)
    more = (ChatMessage(role="user", content="sure?"),)
    between = tokenizer.encode_turn(more, last_token=int(wrote[-1]))
    text = tokenizer.decode(between, skip_special=False)
    assert text == wanted + "<|start|>user\nsure?<|end|>\n<|start|>assistant\n"


def load(tmp_path: Path, folder: Path, **files: str) -> Tokenizer:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / {"config": "tokenizer_config.json", "template": "chat_template.jinja"}[name]).write_text(
            content
        )
    return Tokenizer.load(tmp_path)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, tokenizer_folder: Path):
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};{% endfor %}"
    )
    tokenizer = load(tmp_path, tokenizer_folder, template=template)
    with pytest.raises(InvalidArgument, match="rewrites earlier turns"):
        tokenizer.encode_turn((ChatMessage(role="user", content="x"),), last_token=1)


def test_templates_may_use_what_templates_use(tmp_path: Path, tokenizer_folder: Path):
    template = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {%- generation %}{{ m.content | tojson }}{% endgeneration %}\n"
        "{%- endfor %}{{ eos_token }}{{ strftime_now('%Y') | length }}"
    )
    config = json.dumps({"eos_token": {"content": "<|end|>"}})
    tokenizer = load(tmp_path, tokenizer_folder, template=template, config=config)
    chat = (ChatMessage(role="tool", content="no"), ChatMessage(role="user", content='say "ä"'))
    assert tokenizer.render(chat) == '"say \\"ä\\""<|end|>4'


def test_a_template_that_refuses_says_why(tmp_path: Path, tokenizer_folder: Path):
    tokenizer = load(tmp_path, tokenizer_folder, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        tokenizer.render(CHAT)


def test_a_template_cannot_reach_python(tmp_path: Path, tokenizer_folder: Path):
    tokenizer = load(tmp_path, tokenizer_folder, template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidArgument, match="unsafe"):
        tokenizer.render(CHAT)


def test_what_is_missing_is_named(tmp_path: Path, tokenizer_folder: Path):
    with pytest.raises(InvalidArgument, match=r"no file tokenizer\.json.*save"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(InvalidArgument, match=r"no chat template.*input_ids"):
        load(tmp_path, tokenizer_folder).render(CHAT)
    with pytest.raises(InvalidArgument, match="cannot be compiled"):
        load(tmp_path, tokenizer_folder, template="{% if %}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json.*save it again"):
        Tokenizer.load(tmp_path)
