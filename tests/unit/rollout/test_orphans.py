"""Which leases were given to nobody: every order of a lease's way here and of a renewal beside it."""

from __future__ import annotations

import itertools

from milepost.types import LeaseKey
from milepost_rollout.orphans import Orphans

KEY, OTHER = LeaseKey(prompt_id="a", attempt=1), LeaseKey(prompt_id="b", attempt=3)


def test_a_lease_whose_call_failed_is_given_back_once():
    orphans = Orphans()
    orphans.call_asked()
    orphans.call_ended()
    orphans.named([KEY])
    assert orphans.take(set()) == (KEY,)
    assert orphans.take(set()) == ()


def test_a_suspect_is_renewed_while_a_call_may_still_bring_it():
    orphans = Orphans()
    orphans.call_asked()
    orphans.named([KEY])
    assert orphans.take(set()) == ()
    assert orphans.suspects == (KEY,)
    orphans.call_ended()
    assert orphans.take(set()) == (KEY,)
    assert orphans.suspects == ()


def test_a_call_asked_later_cannot_have_brought_it():
    orphans = Orphans()
    orphans.call_asked()
    orphans.named([KEY])
    orphans.call_ended()
    orphans.call_asked()
    orphans.named([KEY, OTHER])
    assert orphans.take(set()) == (KEY,), "OTHER may be what the second call brings"
    orphans.call_ended()
    assert orphans.take({OTHER}) == ()
    assert orphans.suspects == ()


def test_what_the_ledger_took_back_is_nobodys_any_more():
    orphans = Orphans()
    orphans.call_asked()
    orphans.named([KEY])
    orphans.lost([KEY, OTHER])
    orphans.call_ended()
    assert orphans.take(set()) == ()


def test_no_order_of_events_gives_back_what_a_call_brings():
    """A call grants between asked and ended; a renewal is read from the ledger, and heard of later."""
    steps = ("asked", "granted", "brought", "read", "heard")
    for order in itertools.permutations(steps):
        at = {step: order.index(step) for step in steps}
        if not (at["asked"] < at["granted"] < at["brought"] and at["read"] < at["heard"]):
            continue
        orphans, ours, held, unnamed = Orphans(), set[LeaseKey](), set[LeaseKey](), set[LeaseKey]()
        for step in order:
            if step == "asked":
                orphans.call_asked()
            elif step == "granted":
                held.add(KEY)
            elif step == "brought":
                ours.add(KEY)
                orphans.call_ended()
            elif step == "read":
                unnamed = held - ours
            elif step == "heard":
                orphans.named(unnamed)
            assert orphans.take(ours) == (), order
