"""Draws a snapshot with rich: a pure function from what is known to what is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from milepost.cli.watch_model import Snapshot
from milepost.types import Engine, EngineState, RunStats

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_STATE_STYLES: Mapping[EngineState, str] = {
    EngineState.SERVING: "green",
    EngineState.UPDATING: "cyan",
    EngineState.JOINING: "yellow",
    EngineState.STALE: "yellow",
    EngineState.DRAINING: "yellow",
    EngineState.QUARANTINED: "red",
    EngineState.DEAD: "red",
}


def draw(snapshot: Snapshot) -> RenderableType:
    """The whole view."""
    return Group(
        _headline(snapshot),
        Columns([_learning(snapshot), _ledger(snapshot)], expand=True),
        _engines(snapshot),
        _services(snapshot),
    )


def _headline(s: Snapshot) -> Text:
    text = Text(f"run {s.run_id}", style="bold")
    trainer = s.trainer.value
    if trainer:
        text.append(f"  step {trainer.step}  {trainer.phase}", style="cyan")
        text.append(f"  {trainer.waiting_for}" if trainer.waiting_for else "", style="dim")
    return text


_PARTS = {"wait": "train_wait", "train": "train", "publish": "update_weights"}


def _learning(s: Snapshot) -> Panel:
    grid = Table.grid(padding=(0, 2))
    for name, label in (("rollout/raw_reward", "reward"), ("train/loss", "loss")):
        grid.add_row(label, number(s.latest(name)), Text(sparkline(s.series(name)), style="green"))
    ages = (number(s.latest(f"milepost/step_staleness_{n}")) for n in ("mean", "max"))
    grid.add_row("staleness", "", "mean {}  max {}".format(*ages))
    rate = f"learning rate {number(s.latest('train/lr-pg_0'))}"
    grid.add_row("grad norm", number(s.latest("train/grad_norm")), rate)
    parts = "  ".join(f"{n} {number(s.latest(f'perf/{name}_time'))}" for n, name in _PARTS.items())
    grid.add_row("seconds", number(s.latest("perf/step_time")), parts)
    rates = f"generated {number(s.generated_per_s)}  trained {number(s.latest('milepost/step_tokens_per_s'))}"
    grid.add_row("tokens/s", "", rates)
    return Panel(grid, title="learning", title_align="left")


def _ledger(s: Snapshot) -> Panel:
    stats = s.stats.value
    if stats is None:
        return Panel(Text(s.stats.away, style="red"), title="ledger", title_align="left")
    grid = Table.grid(padding=(0, 2))
    most = max(1, stats.waiting, stats.rolling, stats.ready, stats.assigned)
    for name, count in queue(stats):
        grid.add_row(name, f"{count}", Text("█" * math.ceil(20 * count / most), style="blue"))
    dropped = ", ".join(f"{k} {v}" for k, v in sorted(stats.dropped.items()) if v)
    grid.add_row("trained", f"{stats.trained}", f"of {stats.accepted} accepted")
    grid.add_row("dropped", f"{sum(stats.dropped.values())}", dropped)
    weights = f"version {stats.weight_version} of step {stats.weight_label}; committed {stats.committed_step}"
    return Panel(
        Group(grid, Text(weights), Text(stats.waiting_for, style="dim")), title="ledger", title_align="left"
    )


def queue(stats: RunStats) -> Sequence[tuple[str, int]]:
    """Groups on their way, in order."""
    return (
        ("waiting", stats.waiting),
        ("rolling", stats.rolling),
        ("ready", stats.ready),
        ("assigned", stats.assigned),
    )


def _engines(s: Snapshot) -> Panel:
    if not s.engines.value:
        return Panel(Text(s.engines.away or "no engines", style="dim"), title="engines", title_align="left")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in ("engine", "state", "version", "step", "busy", "requests", "failed", "remarks"):
        table.add_column(head, justify="left" if head in ("engine", "state", "remarks") else "right")
    for e in s.engines.value:
        table.add_row(*_engine(e))
    return Panel(table, title="engines", title_align="left")


def _engine(e: Engine) -> Sequence[str | Text]:
    serving = e.state is EngineState.SERVING
    return (
        e.engine_id,
        Text(e.state.name.lower(), style=_STATE_STYLES.get(e.state, "")),
        str(e.weight_version) if serving else "-",
        str(e.weight_label) if serving else "-",
        str(e.in_flight),
        str(e.requests_total),
        str(e.failures_total),
        e.detail,
    )


def _services(s: Snapshot) -> RenderableType:
    lines: list[RenderableType] = []
    gateway = s.gateway.value
    if gateway:
        outcomes = ", ".join(f"{k} {v}" for k, v in sorted(gateway.outcomes.items()) if v)
        paused = "  paused" if gateway.paused else ""
        text = f"gateway  {gateway.groups_in_flight} groups, {gateway.samples_in_flight} samples in flight"
        lines.append(Text(f"{text}; {gateway.groups_sealed} sealed; {outcomes}{paused}"))
        if gateway.last_evaluation:
            e = gateway.last_evaluation
            lines.append(
                Text(f"evaluation  {e.reward_mean:.4f} over {e.num_scored} samples at step {e.weight_label}")
            )
    away = (
        ("buffer", s.stats.away),
        ("router", s.engines.away),
        ("gateway", s.gateway.away),
        ("trainer", s.trainer.away),
    )
    lines += [Text(f"{name} is away: {why}", style="red") for name, why in away if why]
    return Group(*lines)


def number(value: float | None) -> str:
    """A number in few characters; a dash when there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.4g}"


def sparkline(values: Sequence[float], *, width: int = _WIDTH) -> str:
    """The last values as bars between their least and their largest."""
    shown = [v for v in values if math.isfinite(v)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    span = (high - low) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((v - low) / span * len(_BARS)))] for v in shown)
