"""The end of a weight transaction as a small machine, searched exhaustively: when may engines go on?

    trainer ──> router ──> engine (weights, name)       a request in flight ──> its tokens' versions ──> seal
                  └──────> ledger (reserved, published, void; the term)

One engine, one request, two trainers (the second opens its term at any moment), a router that may be killed
between any two steps, a buffer that may be away for a call, with or without having done what it was asked.
`Rules` says in which order the router commits, and holds the rules that guard it: taking one away must break
something, which the tests do one by one.

What is sealed must have been generated, token by token, under versions that the ledger holds as published; an
engine generates only under whole weights that bear their own name; the label never falls; a version is
published only once an engine holds it whole; and whatever happened, the run goes on.

An engine whose loader does all of an order between two steps may also run on all along (`RUNNING`). It is
judged by what is sealed then: no token of nobody's weights, and none of a version newer than the reply names.
Its order may be done late, after its transaction was given up and what it copies from has moved on. Requests
may be sent to it as soon as it has reported that the order is done, before it is named (`REPORTED`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

RESERVED, PUBLISHED, VOID = "reserved", "published", "void"
MIXED, MARKED = 0, 0
"""Weights that are nobody's, and the name that says so."""
AFTER, RESUME, NAME, COPY = "publish, then resume", "beside resuming", "beside naming", "beside the copy"
NAMED, RUNNING = "when it is named", "all along"
RESUMED, REPORTED, ORDERED = "when it has its name", "when it reports", "when it is told"
_STEPS = ("open", "marked", "written", "named", "resumed")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a commit goes, and what guards it.

    Attributes:
      publish: what PublishVersion goes beside.
      spans: the engine reports which version wrote which token; else the reply is bracketed.
      bracket_names_the_end: a bracketed reply names the version at its end too, not the oldest alone.
      refusal_takes_requests: an engine whose version is refused loses its requests, not only new ones.
      seal_asks_the_ledger: a seal with a version that is not published is refused.
      newborn_asks_the_ledger: a router that starts admits a reserved version only by publishing it.
      resume_names_first: an engine goes on only under the name of what it holds.
      goes_on: when the engine generates again.
      served: from when on new requests are sent to it.
      loader_is_sure: an order that fails has written nothing, or ends its engine.
      order_names_the_end: from the order on, replies that end may end with its version.
      abort_takes_requests: an engine that runs on loses its requests when its update is given up.
      faults: how many of (routers killed, transfers that fail, buffers away) there are at most.
    """

    publish: str = NAME
    goes_on: str = NAMED
    served: str = RESUMED
    loader_is_sure: bool = True
    order_names_the_end: bool = True
    abort_takes_requests: bool = True
    spans: bool = True
    bracket_names_the_end: bool = True
    refusal_takes_requests: bool = True
    seal_asks_the_ledger: bool = True
    newborn_asks_the_ledger: bool = True
    resume_names_first: bool = True
    faults: int = 2


@dataclass(frozen=True, kw_only=True)
class Version:
    """A row of the ledger."""

    label: int
    term: int
    state: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request, in flight or answered: what wrote its tokens, and what the gateway will say did."""

    start: int
    wrote: frozenset[int] = frozenset()
    named: frozenset[int] = frozenset()
    last: int = 0
    answered: bool = False


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything.

    Attributes:
      versions: of the ledger; the first has number 1.
      term, newest: of the ledger.
      weights, name, paused: of the engine.
      up, serves: the router runs; the version at which its fleet has the engine, 0: STALE.
      version, step: of its transaction, 0: none.
      order: the version that the engine is ordered to copy, and has not yet; 0: none.
      call: PublishVersion: "", "under way", "done", "refused", "away".
      repeats: the version whose publication it repeats, for the ledger was away.
      astray: publications that a killed router left on the wire.
      request: of the one client; None: it asks anew.
      faults: that are left.
    """

    versions: tuple[Version, ...] = (Version(label=0, term=1, state=PUBLISHED),)
    term: int = 1
    newest: int = 1
    weights: int = 1
    name: int = 1
    paused: bool = False
    up: bool = True
    serves: int = 1
    version: int = 0
    step: str = ""
    order: int = 0
    call: str = ""
    repeats: int = 0
    astray: frozenset[int] = frozenset()
    request: Request | None = None
    faults: int = 2

    def row(self, version: int) -> Version:
        """Of the ledger."""
        return self.versions[version - 1]

    @property
    def label(self) -> int:
        """p."""
        return self.row(self.newest).label


Move = tuple[str, bool, State]
"""What happens, whether it may be counted on, and what comes of it."""


def moves(s: State, rules: Rules) -> Iterator[Move]:
    """What may happen next."""
    yield from _trainers(s, rules)
    yield from _client(s, rules)
    yield from _engine(s, rules)
    if s.up:
        yield from _transaction(s, rules)
        yield from _background(s, rules)
    yield from _faults(s, rules)
    for version in s.astray:
        rest = s.astray - {version}
        yield "a stray publication arrives", True, replace(_publish(s, version)[0], astray=rest)
        yield "a stray publication is lost", True, replace(s, astray=rest)


# ---------------------------------------------------------------------------------------------- the ledger


def _publish(s: State, version: int) -> tuple[State, bool]:
    """PublishVersion under the term that reserved it; False: refused."""
    row = s.row(version)
    if row.term < s.term:
        return s, False
    if row.state == PUBLISHED:
        return s, True
    if row.state == VOID or (version > s.newest and row.label < s.label):
        return s, False
    if version < s.newest and row.label > s.label:
        return s, False
    return replace(_with_state(s, version, PUBLISHED), newest=max(s.newest, version)), True


def _with_state(s: State, version: int, state: str) -> State:
    rows = list(s.versions)
    rows[version - 1] = replace(rows[version - 1], state=state)
    return replace(s, versions=tuple(rows))


def _trainers(s: State, rules: Rules) -> Iterator[Move]:
    if s.term == 1:
        opened = replace(s, term=2)
        for number, row in enumerate(s.versions, 1):
            if row.state == RESERVED:
                opened = _with_state(opened, number, VOID)
        yield "a second trainer opens its term", False, opened
    if not s.up or s.version or s.repeats:
        return
    due = 1 if s.term == 1 else s.label
    if s.serves and s.row(s.serves).label == due:
        if s.label < due:
            yield "the router restates what is served", True, _publish(s, s.serves)[0]
        return
    again = [v for v, row in enumerate(s.versions, 1) if (row.label, row.term) == (due, s.term)]
    if again and rules.goes_on == RUNNING and s.row(again[-1]).state != VOID:
        yield "prepare the same again", True, replace(s, version=again[-1], step="open")
    elif len(s.versions) < 6:
        row = Version(label=due, term=s.term, state=RESERVED)
        number = len(s.versions) + 1
        yield "prepare", True, replace(s, versions=(*s.versions, row), version=number, step="open")


# ---------------------------------------------------------------------------------------------- the router


def _transaction(s: State, rules: Rules) -> Iterator[Move]:
    if not s.version:
        return
    begins = {COPY: "marked", NAME: "written", RESUME: "named", AFTER: "named"}[rules.publish]
    before_resuming = rules.publish == AFTER and s.call not in ("done", "away")
    if not s.call and s.step in _STEPS and _STEPS.index(s.step) >= _STEPS.index(begins):
        yield "PublishVersion leaves", True, replace(s, call="under way")
    if s.call == "under way":
        applied, ok = _publish(s, s.version)
        yield "the ledger answers", True, replace(applied, call="done" if ok else "refused")
    if s.step == "open":
        if s.row(s.version).term < s.term:
            yield "the newer term ends it", True, replace(s, version=0, step="")
        elif rules.goes_on == RUNNING:
            yield "no new requests", True, replace(s, step="closed", serves=0)
        else:
            marked = replace(s, step="marked", paused=True, name=MARKED, weights=MIXED, serves=0)
            yield "pause, mark, first byte", True, marked
    elif s.step == "marked":
        yield "the last byte, verified", True, replace(s, step="written", weights=s.version)
        if s.faults and s.call != "under way":
            yield "it is aborted", False, _ended(_interrupted(replace(s, faults=s.faults - 1)))
    elif s.step == "written":
        yield from _served_unnamed(s, REPORTED, rules)
        yield "name", True, replace(s, step="named", name=s.version)
        if not rules.resume_names_first:
            yield "resume, and name later", True, replace(s, paused=False)
    elif s.step == "named" and s.call == "refused" and rules.publish == AFTER:
        yield "take the name back", True, _ended(_interrupted(replace(s, name=MARKED)))
    elif s.step == "named" and not before_resuming:
        yield "resume", True, replace(s, step="resumed", paused=False, serves=s.version)
        if s.call == "refused" and s.serves:
            yield from (("withdraw unnamed", True, _ended(after)) for after in _withdrawn(s, rules))
    elif s.step == "resumed" and s.call in ("done", "away"):
        yield "committed", True, _ended(replace(s, repeats=s.version if s.call == "away" else 0))
    elif s.step == "resumed" and s.call == "refused":
        yield from (("withdraw", True, _ended(after)) for after in _withdrawn(s, rules))

    elif s.step == "closed":
        yield "mark, order", True, replace(s, step="ordered", order=s.version, name=MARKED)
        if s.faults:
            back = s.name if s.name != MARKED and s.row(s.name).state == PUBLISHED else 0
            yield "it is aborted untouched", False, _ended(replace(s, serves=back, faults=s.faults - 1))
    elif s.step in ("ordered", "done"):
        yield from _ordered(s, rules)
    elif s.step == "failed":
        yield from (("it is given up", True, _ended(after)) for after in _withdrawn(s, rules))
    elif s.step == "aborting":
        yield "its requests end", True, _ended(_interrupted(s))


def _served_unnamed(s: State, when: str, rules: Rules) -> Iterator[Move]:
    """New requests go to an engine that has no name yet; refused, it loses them, and is named later."""
    if rules.served != when:
        return
    if s.call != "refused":
        if not s.serves:
            yield "served, and named later", True, replace(s, serves=s.version)
    elif s.serves:
        yield from (("withdraw unnamed", True, after) for after in _withdrawn(s, rules))


def _ordered(s: State, rules: Rules) -> Iterator[Move]:
    yield from _served_unnamed(s, ORDERED, rules)
    if s.step == "done":
        yield "the report is good", True, replace(s, step="written")
    if not s.faults:
        return
    left = replace(s, faults=s.faults - 1)
    if rules.abort_takes_requests:
        for after in _withdrawn(left, rules):
            yield "it is aborted", False, _ended(after)
    else:
        yield "it is aborted", False, replace(left, step="aborting")


def _engine(s: State, rules: Rules) -> Iterator[Move]:
    """What an engine does by itself: the order that it was given."""
    if not s.order:
        return
    over = replace(s, order=0)
    if not (s.step == "ordered" and s.order == s.version):
        yield "a late order is done", False, replace(over, weights=MIXED)
        return
    yield "the order is done", True, replace(over, weights=s.version, step="done")
    if not s.faults:
        return
    failed = replace(over, step="failed", faults=s.faults - 1)
    yield "the order is refused", False, failed
    if rules.loader_is_sure:
        ended = _ended(replace(failed, weights=MIXED))
        yield "the order fails half way and ends it", False, replace(ended, request=None)
        yield "the same, a stream kept", False, replace(ended, request=_answered(s.request))
    else:
        yield "the order fails half way", False, replace(failed, weights=MIXED)


def _ended(s: State) -> State:
    return replace(s, version=0, step="", call="")


def _interrupted(s: State) -> State:
    """An engine in mid-update is let go: its requests end with what they have, and it is STALE."""
    return replace(s, paused=False, serves=0, request=_answered(s.request))


def _withdrawn(s: State, rules: Rules) -> Iterator[State]:
    """The ledger refused what is served: nobody serves it, and what is generated under it is cut off.

    The client of a stream may keep what it has of it.
    """
    if not rules.refusal_takes_requests:
        yield replace(s, serves=0)
    else:
        yield replace(s, serves=0, request=None)
        yield replace(s, serves=0, request=_answered(s.request))


def _background(s: State, rules: Rules) -> Iterator[Move]:
    if s.repeats:
        published, ok = _publish(s, s.repeats)
        refused = _withdrawn(s, rules) if s.serves == s.repeats else [s]
        for after in [published] if ok else refused:
            yield "the repeated publication is answered", True, replace(after, repeats=0)
    if s.version or s.serves:
        return
    if s.name == MARKED:
        if s.paused:
            yield "a look frees half an update", True, _interrupted(s)
        return
    judged, ok = s, True
    if s.row(s.name).state == RESERVED and rules.newborn_asks_the_ledger:
        judged, ok = _publish(s, s.name)
    state = judged.row(s.name).state
    trusted = state == PUBLISHED or (state == RESERVED and not rules.newborn_asks_the_ledger)
    if ok and trusted and s.name >= judged.newest:
        yield "a look admits it", True, replace(judged, serves=s.name, paused=False)


def _faults(s: State, rules: Rules) -> Iterator[Move]:
    if not s.up:
        yield "a router starts", True, replace(s, up=True)
    if not s.faults:
        return
    left = s.faults - 1
    if s.up:
        stray = {s.version} if s.call == "under way" else set[int]()
        down = _ended(replace(s, up=False, serves=0, faults=left, astray=s.astray | stray, repeats=0))
        yield "the router is killed", False, replace(down, request=None)
        if s.request is not None and not s.request.answered and s.request.wrote:
            yield "the router is killed, a stream kept", False, replace(down, request=_answered(s.request))
    if s.call == "under way":
        yield "the buffer is away", False, replace(s, call="away", faults=left)
        applied, ok = _publish(s, s.version)
        if ok:
            yield "the buffer is away, having published", False, replace(applied, call="away", faults=left)


# ---------------------------------------------------------------------------------------------- the client


def _client(s: State, rules: Rules) -> Iterator[Move]:
    request = s.request
    if request is None:
        if s.up and s.serves:
            yield "a request comes", True, replace(s, request=Request(start=s.serves))
    elif not request.answered:
        if not s.paused:
            named = {s.name} if rules.spans else {request.start}
            wrote = replace(
                request,
                wrote=request.wrote | {s.weights},
                named=request.named | named,
                last=_end_named(s, request, rules),
            )
            yield "a token", True, replace(s, request=wrote)
        if request.wrote and s.up:
            yield "it is answered", True, replace(s, request=_answered(request))
    else:
        yield from _seal(s, request, rules)


def _end_named(s: State, request: Request, rules: Rules) -> int:
    """What the router would say wrote the token that comes now."""
    if s.name != MARKED or rules.goes_on == NAMED:
        return s.name
    return s.version if s.version and rules.order_names_the_end else request.start


def _answered(request: Request | None) -> Request | None:
    """It ends with what it has; nothing at all is asked for again."""
    return replace(request, answered=True) if request is not None and request.wrote else None


def claims(request: Request, rules: Rules) -> frozenset[int]:
    """The versions that the group's header names."""
    if rules.spans or not rules.bracket_names_the_end:
        return request.named
    return request.named | {request.last}


def _seal(s: State, request: Request, rules: Rules) -> Iterator[Move]:
    states = {s.row(version).state for version in claims(request, rules)}
    if states == {PUBLISHED} or not rules.seal_asks_the_ledger:
        yield "sealed", True, replace(s, request=None)
    elif VOID in states:
        yield "refused for ever, rolled again", True, replace(s, request=None)
    else:
        yield "waited for in vain, rolled again", True, replace(s, request=None)


# ---------------------------------------------------------------------------------------------- the judge


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a search found: states seen, what broke (with the way there), and whence nothing moves on."""

    states: int
    broken: dict[str, list[str]]
    stuck: list[State]
    seen: frozenset[str]


def search(rules: Rules) -> Verdict:
    """Visits every state that can be reached."""
    start = State(faults=rules.faults)
    came: dict[State, tuple[State, str] | None] = {start: None}
    fair: dict[State, list[State]] = {}
    broken: dict[str, list[str]] = {}
    names: set[str] = set()
    queue = deque([start])
    while queue:
        state = queue.popleft()
        for name, counted_on, after in moves(state, rules):
            names.add(name)
            for what in _violations(state, name, after, rules):
                broken.setdefault(what, [*_way(came, state), name])
            if counted_on:
                fair.setdefault(after, []).append(state)
            if after not in came:
                came[after] = (state, name)
                queue.append(after)
    return Verdict(states=len(came), broken=broken, stuck=_stuck(set(came), fair), seen=frozenset(names))


def _violations(s: State, name: str, after: State, rules: Rules) -> Iterator[str]:
    if name == "a token" and s.weights != s.name and (rules.spans or rules.goes_on == NAMED):
        yield "a token of weights that do not bear their name"
    if name == "sealed" and s.request is not None:
        states = {s.row(version).state for version in s.request.wrote if version != MIXED}
        if states - {PUBLISHED}:
            yield f"sealed with tokens of a version that is {min(states - {PUBLISHED})}"
        if MIXED in s.request.wrote:
            yield "sealed with tokens of weights that are nobody's"
        if not rules.spans and max(s.request.wrote) > max(claims(s.request, rules)):
            yield "sealed with tokens of a version newer than it names"
    if after.serves and after.weights != after.serves:
        yield "served from under another version than its weights'"
    if after.label < s.label:
        yield "the label falls"
    newly = [v for v, (a, b) in enumerate(zip(s.versions, after.versions, strict=False), 1) if a != b]
    if any(after.row(v).state == PUBLISHED and after.weights != v for v in newly) and not s.astray:
        yield "published before any engine holds it whole"
    if name == "a look admits it" and after.row(after.serves).state != PUBLISHED:
        yield "a starting router serves what is not published"


def _way(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    way: list[str] = []
    while (step := came[state]) is not None:
        state, name = step
        way.append(name)
    return way[::-1]


def _stuck(seen: set[State], fair: dict[State, list[State]]) -> list[State]:
    """States from which moves that may be counted on do not lead to a newest version that is served."""
    good = {s for s in seen if s.up and s.serves == s.newest and not s.version and s.request is None}
    queue = deque(good)
    while queue:
        for before in fair.get(queue.popleft(), ()):
            if before not in good:
                good.add(before)
                queue.append(before)
    return [s for s in seen if s not in good]
