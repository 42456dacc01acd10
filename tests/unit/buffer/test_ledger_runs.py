"""Runs and their configuration; what is refused before it reaches Redis."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from milepost import errors
from milepost import types as t
from milepost_buffer import checks, run_config


def test_defaults_fill_every_field_but_sampling() -> None:
    resolved = run_config.resolve(t.RunConfig())
    unset = [f.name for f in fields(t.RunConfig) if getattr(resolved, f.name) is None]
    assert unset == ["sampling"]
    assert resolved.groups_per_step == 32
    assert resolved.on_stale == t.OnStale.REQUEUE


def test_a_config_survives_its_json() -> None:
    sampling = t.SamplingParams(temperature=0.7, stop=("a", "b"), stop_token_ids=(1, 2), seed=3)
    config = run_config.resolve(t.RunConfig(sampling=sampling, tail=t.Tail.DROP, reward="math"))
    assert run_config.from_json(run_config.to_json(config)) == config


@pytest.mark.parametrize(
    "change, named",
    [
        ({"groups_per_step": 0}, "groups_per_step = 0"),
        ({"max_staleness": 300}, "max_staleness = 300"),
        ({"publish_every": 4}, "max_staleness >= 3"),
        ({"lease_ttl_s": 0.0}, "lease_ttl_s = 0.0"),
        ({"max_group_bytes": 16 * 1024 * 1024}, "max_group_bytes"),
        ({"max_payload_bytes": 1000}, "max_payload_bytes = 1000"),
        ({"max_attempts": 0}, "max_attempts = 0"),
    ],
)
def test_bad_values_are_named_with_their_bound(change, named) -> None:
    with pytest.raises(errors.InvalidArgument, match=named):
        run_config.resolve(t.RunConfig(**change))


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "{r}", "a/b"])
def test_run_names(name) -> None:
    with pytest.raises(errors.InvalidArgument, match="run_id"):
        run_config.check_run_id(name)


async def test_creating_a_run_again(bench) -> None:
    from_file = (await bench.ledger.runs.get(bench.run_id)).config
    _, created = await bench.ledger.runs.create(bench.run_id, config=from_file)
    assert not created
    with pytest.raises(errors.AlreadyExists, match=bench.run_id):
        await bench.ledger.runs.create(bench.run_id, config=replace(from_file, groups_per_step=7))
    # A trainer that restarts still has the config of its file, whatever was changed live since.
    await bench.ledger.runs.update(bench.run_id, config=t.RunConfig(max_staleness=0))
    run, created = await bench.ledger.runs.create(bench.run_id, config=from_file)
    assert (created, run.config.max_staleness) == (False, 0)


async def test_live_changes_are_checked_and_logged(bench) -> None:
    update = bench.ledger.runs.update
    with pytest.raises(errors.InvalidArgument, match="live fields are"):
        await update(bench.run_id, config=t.RunConfig(samples_per_prompt=4))
    with pytest.raises(errors.InvalidArgument, match="publish_every"):
        await update(bench.run_id, config=t.RunConfig(publish_every=3))
    with pytest.raises(errors.InvalidArgument, match="max_payload_bytes"):
        await update(bench.run_id, config=t.RunConfig(groups_per_step=1000))
    run = await update(bench.run_id, config=t.RunConfig(max_staleness=0), comment="ada: on policy")
    assert run.config.max_staleness == 0
    (entry,) = await bench.ledger.runs.log(bench.run_id)
    assert entry["comment"] == "ada: on policy"
    assert run_config.from_json(entry["before"]).max_staleness == 1
    assert run_config.from_json(entry["after"]).max_staleness == 0


async def test_unknown_runs_are_named_everywhere(bench) -> None:
    nobody = "never-made"
    ledger = bench.ledger
    calls = [
        ledger.runs.get(nobody),
        ledger.prompts.open_source(nobody, source_id="s"),
        ledger.prompts.lease(nobody, gateway_id="g", instance_id="i", max_prompts=1),
        ledger.steps.open_term(nobody, consumer_id="trainer"),
        ledger.versions.get(nobody, version=1),
        ledger.accounts.stats(nobody),
    ]
    for call in calls:
        with pytest.raises(errors.NotFound, match=nobody):
            await call


async def test_followers_are_not_there_yet(bench) -> None:
    with pytest.raises(errors.Unimplemented, match="critic"):
        await bench.ledger.steps.open_term(bench.run_id, consumer_id="critic")


async def test_rows_come_by_step_then_by_acceptance(bench) -> None:
    first = await bench.train_step(1)
    await bench.put(3)
    await bench.seal(await bench.lease(3), versions=(2,))
    ids = await bench.step_ids(2)

    async def names(**options) -> list[str]:
        pages = bench.ledger.accounts.rows(bench.run_id, **options)
        return [r.prompt_id async for page in pages for r in page]

    assert await names() == [*first, *ids, "p004"]
    assert await names(from_step=2) == ids
    assert await names(states=[t.PromptState.READY]) == ["p004"]
    assert await names(prompt_ids=["p004", "nobody", first[0]]) == ["p004", first[0]]


# ------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    "prompt, named",
    [
        (t.Prompt(prompt_id=""), "prompt_id"),
        (t.Prompt(prompt_id="x" * 600, text="a"), "600 bytes"),
        (t.Prompt(prompt_id="a"), "no input"),
        (t.Prompt(prompt_id="a", messages=()), "chat.messages"),
        (t.Prompt(prompt_id="a", input_ids=np.array([1, -2], np.int32)), "input_ids"),
        (t.Prompt(prompt_id="a", text="x", metadata_json="[1]"), "JSON object"),
        (t.Prompt(prompt_id="a", text="x", metadata_json="{"), "not JSON"),
        (t.Prompt(prompt_id="a", text="x", sampling=t.SamplingParams(top_p=0.0)), "top_p = 0.0"),
        (t.Prompt(prompt_id="a", text="x", sampling=t.SamplingParams(top_k=0)), "top_k = 0"),
        (t.Prompt(prompt_id="a", text="x", sampling=t.SamplingParams(max_new_tokens=0)), "max_new_tokens"),
    ],
)
def test_bad_prompts_are_named(prompt, named) -> None:
    with pytest.raises(errors.InvalidArgument, match=named):
        checks.check_prompt(prompt, size_bytes=10, where="items[0].prompt")


def test_good_groups_pass(make_group) -> None:
    assert checks.group_problem(make_group("p", 1)) is None
    assert checks.group_problem(make_group("p", 1, versions=())) is None


@pytest.mark.parametrize(
    "change, named",
    [
        ({"outcomes": (t.Outcome.COMPLETED,)}, "outcomes has 1"),
        ({"rewards": (1.0, 2.0, 3.0)}, "rewards has 3"),
        ({"outcomes": (t.Outcome.UNSPECIFIED, t.Outcome.COMPLETED)}, "UNSPECIFIED"),
        ({"num_tokens": (0, 4), "num_loss_tokens": 1}, "num_tokens holds 0"),
        ({"rewards": (float("inf"), 0.0)}, "rewards"),
        ({"num_loss_tokens": 1000}, "num_loss_tokens = 1000"),
        ({"weight_versions": (2, 1)}, "ascending"),
        ({"weight_versions": (0, 1)}, "no ledger names"),
        ({"weight_versions": ()}, "weight_versions is empty"),
        ({"digest": b"short"}, "5 bytes"),
        ({"digest": b"x" * 32}, "not the SHA-256"),
    ],
)
def test_bad_groups_are_named(make_group, change, named) -> None:
    good = make_group("p", 1)
    problem = checks.group_problem(replace(good, header=replace(good.header, **change)))
    assert problem is not None
    assert named in problem


async def test_limits_of_one_call(bench, make_group) -> None:
    with pytest.raises(errors.InvalidArgument, match="groups: 257"):
        await bench.ledger.prompts.seal(bench.run_id, groups=[make_group("p", 1)] * 257)
    with pytest.raises(errors.InvalidArgument, match="at most"):
        await bench.ledger.prompts.seal(bench.run_id, groups=[make_group("p", 1, size=16 << 20)])
    with pytest.raises(errors.InvalidArgument, match="max_prompts: 0"):
        await bench.lease(0)
    with pytest.raises(errors.InvalidArgument, match="step = 0"):
        await bench.lease_step(0)
    with pytest.raises(errors.InvalidArgument, match="term"):
        await bench.lease_step(1, term=1 << 60)


async def test_a_listing_leaves_out_no_prompt_that_comes_into_a_step_meanwhile(bench) -> None:
    await bench.train_step(1)
    names = await bench.put(2)
    leases = await bench.lease(2)
    pages = bench.ledger.accounts.rows(bench.run_id)
    listed = [row.prompt_id for row in await anext(pages)]
    await bench.seal(leases, versions=(max(bench.versions.values()),))
    await bench.lease_step(2)
    listed += [row.prompt_id async for page in pages for row in page]
    assert sorted(listed) == sorted({*listed})
    assert set(names) <= set(listed)
