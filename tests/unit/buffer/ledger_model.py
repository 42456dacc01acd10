"""The ledger's rules written down naively: lists, full scans, no indices. The judge of the stateful test."""

from __future__ import annotations

from dataclasses import dataclass, field

from milepost import types as t

TTL_S = 10
GROUP_BYTES = 50
WAITING, ROLLING, READY, ASSIGNED, TRAINED, DROPPED = (t.PromptState(i) for i in range(1, 7))
SealStatus, DropReason = t.SealStatus, t.DropReason


@dataclass
class Row:
    """One prompt in the model."""

    name: str
    seq: int
    source: str
    state: t.PromptState = WAITING
    attempt: int = 0
    instance: str = ""
    lease_label: int = 0
    expiry: int = 0
    fail: int = 0
    stale: int = 0
    sealed: str = ""
    label: int = 0
    seal_seq: int = 0
    held: bool = False
    step: int = 0
    why: DropReason = DropReason.UNSPECIFIED


@dataclass
class Model:
    """The rules, naively."""

    config: t.RunConfig
    rows: dict[str, Row] = field(default_factory=dict)
    steps: dict[int, list[str]] = field(default_factory=dict)
    bounds: dict[int, int] = field(default_factory=dict)
    sources: dict[str, bool] = field(default_factory=dict)
    cursors: dict[str, str] = field(default_factory=dict)
    gateways: dict[str, str] = field(default_factory=dict)
    versions: dict[int, tuple[int, str, int]] = field(default_factory=dict)
    committed: int = 0
    trimmed: int = 0
    term: int = 0
    newest: int = 0
    label: int = 0
    seal_seq: int = 0
    now: int = 1_000_000

    # ------------------------------------------------------------------ arithmetic

    def of(self, state: t.PromptState) -> list[Row]:
        return [r for r in self.rows.values() if r.state == state]

    def room(self) -> int:
        """The formula of the ledger, plus steps at or below p that a gap has opened again."""
        if not self.newest:
            return 0
        c, p = self.config, self.label
        size = c.groups_per_step
        window = range(p + 1, p + 1 + c.max_staleness + 1)
        allowed = sum(len(self.steps.get(i, ())) or size for i in window)
        allowed += sum(size for i in range(self.committed + 1, p + 1) if i not in self.steps)
        taken = sum(len(self.steps.get(i, ())) for i in window)
        return allowed - taken - len(self.of(ROLLING)) - len(self.of(READY))

    def bytes_room(self) -> int:
        held = GROUP_BYTES * sum(r.held for r in self.rows.values())
        return (self.config.max_payload_bytes - held) // self.config.max_group_bytes - len(self.of(ROLLING))

    def credits(self, source: str = "") -> int:
        limit = (self.config.max_staleness + 2) * self.config.groups_per_step
        free = max(0, limit - len(self.of(WAITING)))
        if not source:
            return free
        share = -(-limit // max(1, sum(self.sources.values())))
        return max(0, min(free, share - sum(r.source == source for r in self.of(WAITING))))

    # ------------------------------------------------------------------ moves

    def wait(self, row: Row) -> None:
        row.state, row.instance = WAITING, ""

    def drop(self, row: Row, why: DropReason) -> None:
        row.state, row.why, row.held, row.instance = DROPPED, why, False, ""

    def requeue(self, row: Row) -> None:
        self.wait(row)
        row.attempt += 1
        row.sealed, row.held, row.step = "", False, 0
        row.why = DropReason.UNSPECIFIED

    def fail_lease(self, row: Row) -> None:
        row.fail += 1
        if row.fail >= self.config.max_attempts:
            self.drop(row, DropReason.ATTEMPTS)
        else:
            self.wait(row)

    def reap(self) -> None:
        for row in self.of(ROLLING):
            if row.expiry <= self.now:
                self.fail_lease(row)

    def put(self, names: list[str], source: str) -> int:
        room, accepted = self.credits(source), 0
        for name in names:
            if name not in self.rows:
                if not room:
                    break
                room -= 1
                self.rows[name] = Row(name, len(self.rows), source)
            accepted += 1
            if source:
                self.cursors[source] = name
        return accepted

    def lease(self, gateway: str, instance: str, count: int) -> list[tuple[str, int]]:
        if self.gateways.get(gateway) != instance:
            for row in self.of(ROLLING):
                if row.instance == self.gateways.get(gateway):
                    self.wait(row)
            self.gateways[gateway] = instance
        self.reap()
        count = max(0, min(count, self.room(), self.bytes_room()))
        out: list[tuple[str, int]] = []
        for row in sorted(self.of(WAITING), key=lambda r: r.seq)[:count]:
            row.state, row.instance, row.lease_label = ROLLING, instance, self.label
            row.attempt += 1
            row.expiry = self.now + TTL_S * 1000
            out.append((row.name, row.attempt))
        return out

    def seal(self, name: str, attempt: int, salt: str, versions: list[int]) -> SealStatus:
        row = self.rows[name]
        if attempt != row.attempt:
            return SealStatus.LEASE_LOST
        if row.sealed:
            return SealStatus.DUPLICATE if row.sealed == salt else SealStatus.CONFLICT
        if row.state not in (WAITING, ROLLING):
            return SealStatus.LEASE_LOST
        for version in versions:
            if self.versions[version][1] == "reserved":
                return SealStatus.UNKNOWN_VERSION
            if self.versions[version][1] == "void":
                return SealStatus.INVALID
        if row.state == WAITING and min(self.room(), self.bytes_room()) < 1:
            return SealStatus.LEASE_LOST
        self.seal_seq += 1
        row.state, row.sealed, row.held, row.seal_seq = READY, salt, True, self.seal_seq
        row.label = min(self.versions[v][0] for v in versions)
        return SealStatus.SEALED

    def crowded_out(self, step: int, left: list[Row]) -> bool:
        c = self.config
        if c.on_stale == t.OnStale.DROP:
            return False
        after = 0 if c.on_stale == t.OnStale.WAIT else c.stale_attempts
        due = [(r.label, False) for r in left]
        due += [(r.lease_label, True) for r in self.of(ROLLING) if r.stale >= after]
        for k in range(c.max_staleness + 1):
            now = [rolling for label, rolling in due if step <= label + c.max_staleness + 1 <= step + k]
            if len(now) > k * c.groups_per_step and any(now):
                return True
        return False

    def lease_step(self, step: int) -> list[str] | str:
        """Ids, "pending" or "finished"."""
        if step in self.steps:
            return self.steps[step]
        self.reap()
        c = self.config
        for row in self.of(READY):
            if step - 1 - row.label > c.max_staleness:
                if c.on_stale == t.OnStale.DROP:
                    self.drop(row, DropReason.STALE)
                else:
                    row.stale += 1
                    self.requeue(row)
        order = sorted(self.of(READY), key=lambda r: (r.label, r.seal_seq))
        size = c.groups_per_step
        if len(order) < size:
            if self.of(WAITING) or self.of(ROLLING) or not self.sources or any(self.sources.values()):
                return "pending"
            if c.tail == t.Tail.DROP:
                for row in order:
                    self.drop(row, DropReason.TAIL)
                order = []
            if not order:
                return self.close_gap(step)
        if self.crowded_out(step, order[size:]):
            return "pending"
        self.steps[step] = [r.name for r in order[:size]]
        self.bounds[step] = c.max_staleness
        for row in order[:size]:
            row.state, row.step = ASSIGNED, step
            assert step - 1 - row.label <= c.max_staleness, "beyond the bound"
        return self.steps[step]

    def close_gap(self, step: int) -> list[str] | str:
        """Nothing can fill this step any more: the next one that is kept behind a gap takes its place."""
        kept = min((each for each in self.steps if each > step), default=0)
        if not kept:
            return "finished"
        self.steps[step], self.bounds[step] = self.steps.pop(kept), self.bounds.pop(kept)
        for name in self.steps[step]:
            self.rows[name].step = step
        return self.steps[step]

    def commit(self, step: int, dropped: dict[str, DropReason]) -> None:
        for name in self.steps[step]:
            row = self.rows[name]
            row.state, row.why = TRAINED, DropReason.UNSPECIFIED
            if name in dropped:
                row.state, row.why = DROPPED, dropped[name]
        self.committed = step

    def resume(self, checkpoint: int, on_gap: t.OnGap) -> None:
        for step in range(checkpoint + 1, self.committed + 1):
            for name in self.steps[step]:
                self.rows[name].state = ASSIGNED
        for step in range(checkpoint + 1, self.trimmed + 1):
            for name in self.steps.pop(step):
                if on_gap == t.OnGap.DROP:
                    self.drop(self.rows[name], DropReason.GAP)
                    self.rows[name].step = 0
                else:
                    self.requeue(self.rows[name])
        self.committed, self.trimmed = checkpoint, min(self.trimmed, checkpoint)

    def open_term(self, term: int) -> None:
        self.term = term
        for number, (label, state, owner) in self.versions.items():
            if state == "reserved":
                self.versions[number] = (label, "void", owner)

    def trim(self, step: int) -> None:
        self.trimmed = max(self.trimmed, step)
        for row in self.rows.values():
            if 0 < row.step <= self.trimmed:
                row.held = False
