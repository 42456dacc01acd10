"""Drawing tokens: supports, frequencies, log-probs, determinism."""

from __future__ import annotations

import math

import pytest
import torch

from milepost_engine.generation import LogprobOptions
from milepost_engine.sampling import SamplingPlan, input_logprobs

LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0]


def _softmax(values, temperature=1.0):
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def _draw(rows, logits=LOGITS, *, seed=0):
    plan = SamplingPlan(rows, shared=torch.Generator().manual_seed(seed))
    return plan.draw(torch.tensor([list(logits)] * len(rows)))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_frequencies_are_those_of_the_tempered_softmax(new_generation, temperature):
    count = 20_000
    drawn = _draw([new_generation([1], temperature=temperature)] * count)
    for token, probability in enumerate(_softmax(LOGITS, temperature)):
        sigma = math.sqrt(probability * (1 - probability) / count)
        assert drawn.tokens.count(token) / count == pytest.approx(probability, abs=5 * sigma)


@pytest.mark.parametrize(
    "sampling, support",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.8}, {0, 1, 2}),  # 0.55, 0.20, 0.12: the token that crosses the mass is kept
        ({"min_p": 0.3}, {0, 1}),  # ratios to the best: 1, 0.37, 0.22
        ({"top_k": 3, "top_p": 0.7}, {0, 1}),
        ({}, {0, 1, 2, 3, 4, 5}),
    ],
)
def test_restrictions_change_the_support_and_not_the_logprobs(new_generation, sampling, support):
    drawn = _draw([new_generation([1], **sampling)] * 4000)
    assert set(drawn.tokens) == support
    expected = [math.log(p) for p in _softmax(LOGITS)]
    assert drawn.logprobs[:50] == pytest.approx([expected[token] for token in drawn.tokens[:50]], abs=1e-6)


def test_rows_keep_their_own_parameters(new_generation):
    rows = [
        new_generation([1], temperature=0.0),
        new_generation([1], top_k=1, temperature=0.5),
        new_generation([1], top_k=2),
        new_generation([1], temperature=100.0),
    ] * 500
    tokens = _draw(rows).tokens
    assert set(tokens[0::4]) == {0}
    assert set(tokens[1::4]) == {0}
    assert set(tokens[2::4]) == {0, 1}
    assert set(tokens[3::4]) == {0, 1, 2, 3, 4, 5}


def test_greedy_reports_temperature_one_or_its_own(new_generation):
    cold = new_generation([1], temperature=0.0)
    warm = new_generation([1], temperature=0.5, top_k=1)
    drawn = _draw([cold, warm])
    assert drawn.tokens == [0, 0]
    expected = [math.log(_softmax(LOGITS)[0]), math.log(_softmax(LOGITS, 0.5)[0])]
    assert drawn.logprobs == pytest.approx(expected, abs=1e-6)


def test_a_seeded_row_draws_the_same_in_any_company(new_generation):
    def seeded():
        row = new_generation([1], sampling_seed=9)
        row.generator = torch.Generator().manual_seed(9)
        return row

    alone = [_draw([row := seeded()]).tokens[0]] + [_draw([row]).tokens[0] for _ in range(20)]
    row, others = seeded(), [new_generation([1]) for _ in range(3)]
    crowded = [_draw([*others, row], seed=step).tokens[3] for step in range(21)]
    assert crowded == alone
    assert len(set(alone)) > 1


def test_penalties_follow_their_formulas(new_generation):
    row = new_generation(
        [1],
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={3: 1.5},
        logprobs=LogprobOptions(wanted=True, top=6),
    )
    row.output_ids = [0, 0, 4]
    (best,) = _draw([row]).top
    adjusted = [2.0 / 2 - 0.5 * 2 - 0.25, 1.0, 0.5, 0.0 + 1.5, -1.0 * 2 - 0.5 - 0.25, -2.0]
    expected = {token: math.log(p) for token, p in enumerate(_softmax(adjusted))}
    assert {token: logprob for logprob, token in best} == pytest.approx(expected, abs=1e-5)


def test_stop_tokens_wait_for_the_minimum(new_generation):
    row = new_generation([1], temperature=0.0, min_new_tokens=2, stop_ids=[0])
    assert _draw([row]).tokens == [1]
    row.output_ids = [1, 1]
    assert _draw([row]).tokens == [0]


def test_input_logprobs_predict_the_next_token():
    logits = torch.tensor([LOGITS, LOGITS[::-1], LOGITS])
    values, top = input_logprobs(logits, [5, 1, 2], start=0, top=2)
    forward, backward = _softmax(LOGITS), _softmax(LOGITS[::-1])
    assert values[0] is None
    assert values[1:] == pytest.approx([math.log(forward[1]), math.log(backward[2])], abs=1e-6)
    assert [token for _, token in top[1]] == [0, 1]
    assert input_logprobs(logits, [5, 1, 2], start=2, top=0) == ([None], [None])
    assert input_logprobs(logits, [5, 1, 2], start=3, top=0) == ([], [])
