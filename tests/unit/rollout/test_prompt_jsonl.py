"""One line of JSONL becomes a prompt, or an error that names line, field, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from milepost.errors import InvalidArgument
from milepost.jsonl import parse_line, read_file, read_lines
from milepost.types import ChatMessage, SamplingParams

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def parse(line: object):
    return parse_line(
        line if isinstance(line, (str, bytes)) else json.dumps(line), number=7, default_id="d/0/6"
    )


def test_every_field_arrives():
    prompt = parse(
        {
            "prompt_id": "mine",
            "prompt": "1+1=",
            "label": "2",
            "metadata": {"level": 3},
            "reward": "regex:(.)",
            "sampling": {"temperature": 0.5, "stop": ["\n"], "stop_token_ids": [4], "seed": 9, "top_k": -1},
        }
    )
    assert (prompt.prompt_id, prompt.text, prompt.label, prompt.reward) == ("mine", "1+1=", "2", "regex:(.)")
    assert json.loads(prompt.metadata_json) == {"level": 3}
    assert prompt.sampling == SamplingParams(
        temperature=0.5, stop=("\n",), stop_token_ids=(4,), seed=9, top_k=-1
    )
    assert prompt.messages is None
    assert prompt.input_ids is None


def test_messages_and_ids():
    chat = parse({"messages": [{"role": "user", "content": "hi"}]})
    assert chat.messages == (ChatMessage(role="user", content="hi"),)
    assert chat.prompt_id == "d/0/6"
    ids = parse({"input_ids": [1, 2, 2**31 - 1]}).input_ids
    assert ids is not None
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 2, 2**31 - 1]


@pytest.mark.parametrize(
    "line, field, value, remedy",
    [
        ("{'prompt': 1}", "the line", "{'prompt': 1}", "double quotes"),
        ("[1]", "the line", "[1]", 'write {"prompt"'),
        (b"\xff\xfe", "the line", "xff", "UTF-8"),
        ('{"prompt": "a", "metadata": {"b": NaN}}', "the line", "NaN", "finite"),
        ({"promt": "x", "label": ""}, "promt", "x", "did you mean 'prompt'?"),
        ({"label": "x"}, "input", "none of them", "keep one"),
        ({"prompt": "a", "input_ids": [1]}, "input", "prompt and input_ids", "keep one"),
        ({"prompt": ["a"]}, "prompt", '["a"]', "messages"),
        ({"prompt": ""}, "prompt", "", "messages"),
        ({"messages": "hi"}, "messages", "hi", '[{"role"'),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "null", "role and a content"),
        ({"messages": [{"role": "u", "content": "c", "nmae": 1}]}, "messages[0].nmae", "1", "remove it"),
        ({"input_ids": []}, "input_ids", "[]", "[1, 2, 3]"),
        ({"input_ids": [1, -2]}, "input_ids[1]", "-2", "tokenizer's ids"),
        ({"input_ids": [1.5]}, "input_ids[0]", "1.5", "tokenizer's ids"),
        ({"input_ids": [True]}, "input_ids[0]", "true", "tokenizer's ids"),
        ({"prompt": "a", "label": {"b": 1}}, "label", '{"b": 1}', "metadata"),
        ({"prompt": "a", "metadata": [1]}, "metadata", "[1]", "{"),
        ({"prompt": "a", "reward": 3}, "reward", "3", "exact"),
        ({"prompt": "a", "prompt_id": "x" * 513}, "prompt_id", "xxx", "shorten"),
        ({"prompt": "a", "prompt_id": 5}, "prompt_id", "5", "leave it out"),
        ({"prompt": "a", "sampling": {"temprature": 1}}, "sampling.temprature", "1", "'temperature'"),
        ({"prompt": "a", "sampling": {"temperature": -1}}, "sampling.temperature", "-1", "from 0 to 100"),
        ({"prompt": "a", "sampling": {"top_p": 0}}, "sampling.top_p", "0", "above 0"),
        (
            {"prompt": "a", "sampling": {"max_new_tokens": 2.5}},
            "sampling.max_new_tokens",
            "2.5",
            "whole number",
        ),
        ({"prompt": "a", "sampling": {"stop": "x"}}, "sampling.stop", "x", "list of strings"),
        ({"prompt": "a", "sampling": {"ignore_eos": 1}}, "sampling.ignore_eos", "1", "true or false"),
    ],
)
def test_errors_name_line_field_value_and_remedy(line: object, field: str, value: str, remedy: str):
    with pytest.raises(InvalidArgument) as caught:
        parse(line)
    message = str(caught.value)
    assert message.startswith("line 7: ")
    assert field in message
    assert value in message
    assert remedy in message
    assert caught.value.metadata["line"] == "7"


def test_a_malformed_line_does_not_stop_the_rest(tmp_path: Path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "a"}\n\n{oops\n{"prompt": "b", "prompt_id": "mine"}\n{"prompt": "c"}')
    lines = list(read_file(path, epoch=2))
    assert [x.number for x in lines] == [1, 3, 4, 5]
    assert [x.prompt.prompt_id for x in lines if x.prompt] == ["sums/2/0", "mine", "sums/2/4"]
    assert [x.number for x in lines if x.error] == [3]


@relaxed
@given(st.binary(max_size=200))
def test_no_line_raises_anything_else(line: bytes):
    for result in read_lines([line], dataset="d"):
        assert (result.prompt is None) != (result.error is None)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(
    ["prompt", "messages", "input_ids", "label", "metadata", "reward", "sampling", "prompt_id"]
)


@relaxed
@given(st.dictionaries(names, json_values, max_size=4))
def test_any_object_is_a_prompt_or_an_error(fields: dict[str, object]):
    (result,) = read_lines([json.dumps(fields)], dataset="d")
    if result.prompt is not None:
        inputs = (result.prompt.text, result.prompt.messages, result.prompt.input_ids)
        assert sum(x is not None for x in inputs) == 1
