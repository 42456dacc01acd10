"""Admission, searched exhaustively: every order of rolling, sealing, training, publishing, trimming, dying.

A state is what the ledger knows, with groups of one size:

    step       the step that the trainer wants next (committed + 1), and whether it trains it
    label      of the newest published version
    leased     steps above `step` - 1 whose groups are fixed
    trimmed    steps up to it have no payloads any more
    rolling, ready   groups, each by the label at its admission

The trainer dies and starts again at any checkpoint from `trimmed` on; or all checkpoints but the first are
lost, and steps 1 ... trimmed are rolled out again (`on_gap = regenerate`) before those behind them, which are
kept. Where the engines are lost with them, label 0 is published again, else the old label stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

Groups = tuple[int, ...]


@dataclass(frozen=True)
class State:
    step: int = 1
    training: bool = False
    label: int = 0
    leased: frozenset[int] = frozenset()
    trimmed: int = 0
    rolling: Groups = ()
    ready: Groups = ()


@dataclass(frozen=True)
class Rules:
    """`room` is the rule that is judged: (rules, state) -> how many more groups may start rolling."""

    room: Callable[[Rules, State], int]
    max_staleness: int
    groups_per_step: int
    last_step: int
    gaps: bool = True


@dataclass(frozen=True)
class Verdict:
    """Attributes: states seen; those beyond the bound; those from which the last step is never committed."""

    states: int
    too_stale: list[State]
    stuck: list[State]


def room(rules: Rules, state: State) -> int:
    """The ledger's: places of the steps that may still be leased, less what may take them."""
    window = range(state.step, state.label + 2 + rules.max_staleness)
    free = sum(step not in state.leased for step in window)
    return free * rules.groups_per_step - len(state.rolling) - len(state.ready)


def room_less_kept_steps(rules: Rules, state: State) -> int:
    """With every leased step above the label counted as outstanding work."""
    last = state.label + 1 + rules.max_staleness
    return room(rules, state) - sum(step > last for step in state.leased) * rules.groups_per_step


def _without(groups: Groups, index: int) -> Groups:
    return groups[:index] + groups[index + 1 :]


def _with(groups: Groups, label: int) -> Groups:
    return tuple(sorted((*groups, label)))


def _train(rules: Rules, now: State, too_stale: list[State]) -> Iterator[State]:
    if now.training:
        yield replace(now, training=False, step=now.step + 1, leased=now.leased - {now.step})
    elif now.step in now.leased:
        yield replace(now, training=True)
    elif now.step <= rules.last_step:
        oldest = now.step - 1 - rules.max_staleness
        fresh = tuple(label for label in now.ready if label >= oldest)
        taken, left = fresh[: rules.groups_per_step], fresh[rules.groups_per_step :]
        if len(taken) == rules.groups_per_step:
            if any(now.step - 1 - label > rules.max_staleness for label in taken):
                too_stale.append(now)
            yield replace(now, training=True, leased=now.leased | {now.step}, ready=left)
        elif fresh != now.ready:
            yield replace(now, ready=fresh)
    if now.step - 1 > now.label:
        yield replace(now, label=now.step - 1)


def _roll(rules: Rules, now: State) -> Iterator[State]:
    if rules.room(rules, now) > 0:
        yield replace(now, rolling=_with(now.rolling, now.label))
    for index, label in enumerate(now.rolling):
        if label not in now.rolling[:index]:
            yield replace(now, rolling=_without(now.rolling, index), ready=_with(now.ready, label))


def _faults(rules: Rules, now: State) -> Iterator[State]:
    for index in range(len(now.rolling)):
        yield replace(now, rolling=_without(now.rolling, index))
    highest = max(now.leased, default=now.step - 1)
    for checkpoint in range(now.trimmed, now.step):
        yield replace(
            now, step=checkpoint + 1, training=False, leased=frozenset(range(checkpoint + 1, highest + 1))
        )
    if now.step - 1 > now.trimmed:
        yield replace(now, trimmed=now.trimmed + 1)
    if rules.gaps and now.trimmed:
        lost = replace(now, step=1, training=False, leased=frozenset(range(now.trimmed + 1, highest + 1)))
        lost = replace(lost, trimmed=0)
        yield from (lost, replace(lost, label=0))


def search(rules: Rules) -> Verdict:
    """Goes through every state; progress must be possible by what happens without faults."""
    start, too_stale = State(), list[State]()
    seen, queue = {start}, deque([start])
    before: dict[State, list[State]] = {}
    while queue:
        now = queue.popleft()
        for after in (*_train(rules, now, too_stale), *_roll(rules, now)):
            before.setdefault(after, []).append(now)
            if after not in seen:
                seen.add(after)
                queue.append(after)
        for after in _faults(rules, now):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    arrives = {state for state in seen if state.step > rules.last_step}
    queue = deque(arrives)
    while queue:
        for earlier in before.get(queue.popleft(), ()):
            if earlier not in arrives:
                arrives.add(earlier)
                queue.append(earlier)
    return Verdict(len(seen), too_stale, [state for state in seen if state not in arrives])
