"""When may engines go on after new weights? Orders of the commit against every interleaving of deaths."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from commit_model import AFTER, COPY, NAME, ORDERED, REPORTED, RESUME, RUNNING, Rules, Verdict
from commit_model import search as search_all

SPANS = pytest.mark.parametrize("spans", [True, False], ids=["spans", "brackets"])


@cache
def search(rules: Rules) -> Verdict:
    """Each search once."""
    return search_all(rules)


@SPANS
@pytest.mark.parametrize("publish", [AFTER, RESUME, NAME])
def test_engines_may_go_on_beside_the_publication_of_what_they_hold(publish, spans):
    found = search(Rules(publish=publish, spans=spans))
    assert found.broken == {}
    assert found.stuck == []
    assert found.states > 4000


@SPANS
def test_the_search_goes_through_what_it_is_about(spans):
    happened = search(Rules(spans=spans)).seen
    assert {
        "withdraw",
        "committed",
        "sealed",
        "refused for ever, rolled again",
        "the repeated publication is answered",
        "a stray publication arrives",
        "the router is killed, a stream kept",
        "the buffer is away, having published",
        "a look admits it",
    } <= happened


@SPANS
def test_beside_the_copy_versions_are_published_that_nobody_holds(spans):
    found = search(Rules(publish=COPY, spans=spans))
    assert set(found.broken) == {"published before any engine holds it whole"}
    assert found.stuck == []


@pytest.mark.parametrize("publish", [AFTER, NAME])
@pytest.mark.parametrize(
    ("without", "spans", "breaks"),
    [
        ({"seal_asks_the_ledger": False}, True, "sealed with tokens of a version that is void"),
        ({"bracket_names_the_end": False}, False, "sealed with tokens of a version that is void"),
        ({"refusal_takes_requests": False}, False, "sealed with tokens of a version that is void"),
        ({"newborn_asks_the_ledger": False}, True, "a starting router serves what is not published"),
        ({"resume_names_first": False}, True, "a token of weights that do not bear their name"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_no_rule_can_be_left_out(publish, without, spans, breaks):
    found = search(replace(Rules(publish=publish, spans=spans, faults=1), **without))
    assert breaks in found.broken, "the rule guards against nothing"
    assert found.broken[breaks][-1] in ("sealed", "a look admits it", "a token")


RUNS_ON = Rules(goes_on=RUNNING, spans=False)


@pytest.mark.parametrize("publish", [AFTER, RESUME, NAME])
def test_engines_without_spans_may_run_on_through_an_update(publish):
    found = search(replace(RUNS_ON, publish=publish, faults=3))
    assert found.broken == {}
    assert found.stuck == []
    assert {
        "it is aborted",
        "it is aborted untouched",
        "a late order is done",
        "prepare the same again",
        "the order is refused",
        "the order fails half way and ends it",
        "the same, a stream kept",
        "committed",
        "sealed",
    } <= found.seen


@pytest.mark.parametrize(
    ("without", "breaks"),
    [
        ({"spans": True}, "a token of weights that do not bear their name"),
        ({"loader_is_sure": False}, "sealed with tokens of weights that are nobody's"),
        ({"order_names_the_end": False}, "sealed with tokens of a version newer than it names"),
        ({"bracket_names_the_end": False}, "sealed with tokens of a version newer than it names"),
        ({"abort_takes_requests": False}, "sealed with tokens of weights that are nobody's"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_none_of_the_rules_for_running_on_can_be_left_out(without, breaks):
    found = search(replace(RUNS_ON, **without))
    assert breaks in found.broken, "the rule guards against nothing"


@pytest.mark.parametrize("publish", [RESUME, NAME])
def test_engines_that_run_on_may_be_served_from_before_they_are_named(publish):
    found = search(replace(RUNS_ON, publish=publish, served=REPORTED, faults=3))
    assert found.broken == {}
    assert found.stuck == []
    assert {"served, and named later", "withdraw unnamed", "committed", "sealed"} <= found.seen


@pytest.mark.parametrize(
    ("without", "breaks"),
    [
        ({"served": ORDERED}, "served from under another version than its weights'"),
        ({"spans": True}, "a token of weights that do not bear their name"),
        ({"refusal_takes_requests": False}, "sealed with tokens of a version that is void"),
        ({"order_names_the_end": False}, "sealed with tokens of a version newer than it names"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_none_of_the_rules_for_serving_before_the_name_can_be_left_out(without, breaks):
    found = search(replace(RUNS_ON, **({"served": REPORTED} | without)))
    assert breaks in found.broken, "the rule guards against nothing"
