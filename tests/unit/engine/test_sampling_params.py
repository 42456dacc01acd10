"""Sampling parameters are checked field by field."""

from __future__ import annotations

import pytest

from milepost_engine.errors import InvalidRequest
from milepost_engine.params import TOP_K_ALL, SamplingParams, parse_sampling_params


def test_absent_and_null_fields_take_their_defaults():
    assert parse_sampling_params(None) == SamplingParams()
    assert parse_sampling_params({"temperature": None, "stop": None}) == SamplingParams()


def test_every_field_is_read():
    params = parse_sampling_params(
        {
            "max_new_tokens": 7,
            "min_new_tokens": 2,
            "temperature": 1,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "stop": "x",
            "stop_token_ids": [3, 4],
            "ignore_eos": True,
            "n": 3,
            "sampling_seed": -5,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "no_stop_trim": True,
            "frequency_penalty": -0.5,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"4": -2},
        }
    )
    assert params.top_k == TOP_K_ALL
    assert params.stop == ("x",)
    assert params.stop_token_ids == (3, 4)
    assert params.logit_bias == {4: -2.0}
    assert params.penalised
    assert params.temperature == 1.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 1.5),
        ("top_p", 0),
        ("min_p", -0.1),
        ("top_k", 0),
        ("top_k", 1.0),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("n", 0),
        ("sampling_seed", "7"),
        ("repetition_penalty", 0),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value(field, value):
    with pytest.raises(InvalidRequest) as caught:
        parse_sampling_params({field: value})
    assert f"sampling_params.{field}" in str(caught.value)


def test_an_unknown_field_is_refused_with_the_nearest_known_one():
    with pytest.raises(InvalidRequest, match=r"sampling_params\[2\]\.max_tokens is unknown.*max_new_tokens"):
        parse_sampling_params({"max_tokens": 3}, where="sampling_params[2]")
    with pytest.raises(InvalidRequest, match="json_schema is not supported"):
        parse_sampling_params({"json_schema": "{}"})


def test_a_seed_is_spread_over_samples():
    params = parse_sampling_params({"n": 3, "sampling_seed": 10})
    assert [params.for_sample(i).sampling_seed for i in range(3)] == [10, 11, 12]
    assert parse_sampling_params({"n": 3}).for_sample(2).sampling_seed is None


def test_temperature_zero_is_greedy_and_reports_temperature_one():
    params = parse_sampling_params({"temperature": 0})
    assert params.greedy
    assert params.logprob_temperature == 1.0
    warm = parse_sampling_params({"temperature": 0.7, "top_k": 1})
    assert warm.greedy
    assert warm.logprob_temperature == 0.7
