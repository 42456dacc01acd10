"""The hook in an engine's process: recorded from the model's own loader, then done again as copies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from milepost_engine import copy_plan, weight_hook

HIDDEN, HEADS, VOCAB = 8, 4, 10


class Shard(nn.Module):
    """Loads as SGLang's models do: fused projections, shards of a rank, a padded vocabulary."""

    def __init__(self, *, rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rank, self.ranks = rank, ranks
        rows = HEADS // ranks

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, 7.0, dtype=dtype), requires_grad=False)

        self.embed = made(VOCAB // ranks + 2, HIDDEN)
        self.qkv = made(3 * rows, HIDDEN)
        self.down = made(HIDDEN, HEADS // ranks)
        self.norm = made(HIDDEN)
        self.names: list[str] = []

    def load_weights(self, weights: Any) -> None:
        for name, loaded in weights:
            self.names.append(name)
            if name in ("q", "k", "v"):
                rows = HEADS // self.ranks
                place = self.qkv.data.narrow(0, "qkv".index(name) * rows, rows)
                place.copy_(loaded.narrow(0, self.rank * rows, rows))
            elif name == "embed":
                rows = VOCAB // self.ranks
                self.embed[:rows].data.copy_(loaded.narrow(0, self.rank * rows, rows))
                self.embed[rows:].data.fill_(0)
            elif name == "down":
                columns = HEADS // self.ranks
                self.down.data.copy_(loaded.narrow(1, self.rank * columns, columns))
            else:
                self.norm.data.copy_(loaded)


SHAPES = {"embed": (VOCAB, HIDDEN), "q": (HEADS, HIDDEN), "k": (HEADS, HIDDEN), "v": (HEADS, HIDDEN),
          "down": (HIDDEN, HEADS), "norm": (HIDDEN,)}  # fmt: skip


class Trainer:
    """Tensors in one segment, and orders for them."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, wire: str = "float32") -> None:
        total = sum(torch.Size(s).numel() for s in SHAPES.values())
        self.segment = torch.zeros(total, dtype=dtype)
        self.stamp = torch.zeros(1, dtype=torch.int64)
        self.places: list[list[Any]] = []
        self.held: dict[str, torch.Tensor] = {}
        at = 0
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            self.held[name] = self.segment[at : at + size].view(shape)
            kind = str(dtype).removeprefix("torch.")
            self.places.append([name, list(shape), kind, wire, "0", at * dtype.itemsize])
            at += size

    def train(self, seed: int) -> None:
        """Other weights, in the same places."""
        generator = torch.Generator().manual_seed(seed)
        self.segment.copy_(torch.randn(self.segment.shape, generator=generator))

    def order(self, transaction: str, *, whole: bool, layout: str = "a") -> list[tuple[str, Any]]:
        """What `load` is called with."""
        self.stamp += 1
        said: dict[str, Any] = {"transaction": transaction, "layout": layout, "stamp": int(self.stamp)}
        if not whole:
            return [(json.dumps(said), torch.empty(0))]
        text = json.dumps({**said, "places": self.places})
        return [(text, torch.empty(0)), ("0", self.segment), (weight_hook.STAMP, self.stamp)]


def report(model: Any) -> dict[str, Any]:
    return json.loads(bytes(int(x) for x in model.get_weights_by_name(weight_hook.REPORT)))


def expected(trainer: Trainer, **how: Any) -> dict[str, torch.Tensor]:
    """What the model's own loader makes of the trainer's tensors."""
    model = Shard(**how)
    model.load_weights((name, x.clone()) for name, x in trainer.held.items())
    return dict(model.named_parameters())


def same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, wanted[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_a_signal_does_what_the_models_own_loader_did(rank: int, ranks: int):
    trainer, model = Trainer(), Shard(rank=rank, ranks=ranks)
    trainer.train(1)
    weight_hook.load(model, trainer.order("t1", whole=True))
    assert report(model)["ok"], report(model)
    assert same(model, expected(trainer, rank=rank, ranks=ranks))
    model.names.clear()
    for seed in (2, 3):
        trainer.train(seed)
        weight_hook.load(model, trainer.order(f"t{seed}", whole=False))
        assert same(model, expected(trainer, rank=rank, ranks=ranks))
        said = report(model)
        assert (said["transaction"], said["ok"], said["planned"]) == (f"t{seed}", True, True)
    assert model.names == [], "its own loader was not asked again"


def test_a_copy_of_the_trainers_memory_is_not_taken_for_it():
    """As SGLang makes one of a tensor that is opened as another device's."""
    trainer, model = Trainer(), Shard()
    trainer.train(1)
    text, *segments = trainer.order("t1", whole=True)
    weight_hook.load(model, [text, *((name, x.clone()) for name, x in segments)])
    assert report(model)["ok"], "it is right this once"
    trainer.train(2)
    weight_hook.load(model, trainer.order("t2", whole=False))
    said = report(model)
    assert (said["transaction"], said["ok"]) == ("t2", False)
    assert "order 2 is not in it but 1" in said["message"]
    weight_hook.load(model, trainer.order("t3", whole=True))
    assert report(model)["ok"]
    assert same(model, expected(trainer))


@pytest.mark.parametrize("wire", ["bfloat16", "float32"])
def test_the_cast_to_the_engines_dtype_is_that_of_torch(wire: str):
    trainer, model = Trainer(wire=wire), Shard(dtype=torch.bfloat16)
    trainer.train(1)
    weight_hook.load(model, trainer.order("t1", whole=True))
    trainer.train(2)
    weight_hook.load(model, trainer.order("t2", whole=False))
    assert report(model)["planned"]
    assert same(model, expected(trainer, dtype=torch.bfloat16))


def test_neighbours_are_copied_at_once():
    """q, k and v follow one another on both sides."""
    trainer, model = Trainer(), Shard()
    plan = copy_plan.make_plan(model, "a", {n: (x, x.dtype) for n, x in trainer.held.items()})
    (targets, _), *others = plan.small
    assert not others
    assert sorted(t.numel() for t in targets) == sorted([HIDDEN, HIDDEN * HEADS, 3 * HIDDEN * HEADS, 80])
    assert plan.refused == ""


def test_a_loader_that_computes_is_asked_each_time():
    class Doubles(Shard):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, 2 * loaded) for name, loaded in weights)

    trainer, model = Trainer(), Doubles()
    for seed in (1, 2):
        trainer.train(seed)
        weight_hook.load(model, trainer.order(f"t{seed}", whole=seed == 1))
        said = report(model)
        assert said["ok"]
        assert not said["planned"]
        assert torch.equal(model.norm, 2 * trainer.held["norm"])


def test_a_scalar_that_a_loader_reads_is_no_copy():
    class Reads(Shard):
        def load_weights(self, weights: Any) -> None:
            for name, loaded in weights:
                super().load_weights([(name, loaded)])
                if name == "norm":
                    self.norm.data.fill_(loaded[0].item())

    trainer, model = Trainer(), Reads()
    for seed in (1, 2):
        trainer.train(seed)
        weight_hook.load(model, trainer.order(f"t{seed}", whole=seed == 1))
        assert not report(model)["planned"]
        assert torch.equal(model.norm, trainer.held["norm"][0].expand(HIDDEN))


def test_a_copy_through_another_dtype_is_found_out():
    """float32 by way of float16 is not float32: the copies cannot stand for the loader."""
    trainer, model = Trainer(wire="float16"), Shard()
    for seed in (1, 2):
        trainer.train(seed)
        weight_hook.load(model, trainer.order(f"t{seed}", whole=seed == 1))
        assert report(model)["ok"]
        assert not report(model)["planned"]
        assert torch.equal(model.norm, trainer.held["norm"].half().float())


def test_nothing_is_raised_and_the_report_says_what_went_wrong():
    trainer, model = Trainer(), Shard()
    weight_hook.load(model, trainer.order("t1", whole=False))
    said = report(model)
    assert (said["transaction"], said["ok"]) == ("t1", False)
    assert "layout a is not known here" in said["message"]
    weight_hook.load(model, [])
    assert not report(model)["ok"]
    trainer.places[0][1] = [VOCAB, 3]
    weight_hook.load(model, trainer.order("t2", whole=True))
    assert not report(model)["ok"]
    assert report(model)["transaction"] == "t2"
    weight_hook.load(model, trainer.order("t3", whole=False))
    assert "not known" in report(model)["message"], "what failed is not kept"


def test_another_layout_takes_the_place_of_the_last():
    first, second, model = Trainer(), Trainer(dtype=torch.float64), Shard()
    first.train(1)
    second.train(2)
    weight_hook.load(model, first.order("t1", whole=True, layout="a"))
    weight_hook.load(model, second.order("t2", whole=True, layout="b"))
    assert report(model)["ok"]
    assert torch.equal(model.norm, second.held["norm"].float())
    weight_hook.load(model, first.order("t3", whole=False, layout="a"))
    assert not report(model)["ok"]


def test_a_model_keeps_what_it_could_read_before():
    class Reads(Shard):
        def get_weights_by_name(self, name: str, truncate_size: int = 100, tp_size: int = 1) -> Any:
            return self.norm.tolist()[:truncate_size]

    trainer, model = Trainer(), Reads()
    trainer.train(1)
    weight_hook.load(model, trainer.order("t1", whole=True))
    assert report(model)["ok"]
    assert model.get_weights_by_name("norm", 2, tp_size=1) == trainer.held["norm"].tolist()[:2]


def test_the_checksum_tells_places_apart():
    model = Shard()
    before = copy_plan.checksum(model)
    model.norm[0], model.norm[1] = 1.0, 2.0
    one = copy_plan.checksum(model)
    model.norm[0], model.norm[1] = 2.0, 1.0
    assert len({before, one, copy_plan.checksum(model)}) == 3
    assert copy_plan.checksum(model) == copy_plan.checksum(model)


ALONE = """
import json
import sys

import test_weight_hook as here
from milepost_engine import weight_hook

trainer, model = here.Trainer(), here.Shard()


def signal(transaction):
    ((text, _),) = trainer.order(transaction, whole=False)
    said = model.get_weights_by_name(weight_hook.SIGNAL + text, 1, tp_size=1)
    return json.loads(bytes(int(x) for x in said))


trainer.train(1)
weight_hook.load(model, trainer.order("t1", whole=True))
assert here.report(model)["takes_signals"], here.report(model)
trainer.train(2)
said = signal("t2")
assert (said["transaction"], said["ok"], said["planned"]) == ("t2", True, True)
assert said["signalled"] and said["takes_signals"]
assert here.same(model, here.expected(trainer))
"""

REFUSES = """
trainer.stamp = trainer.stamp.clone()
trainer.train(3)
said = signal("t3")
assert not said["ok"] and "is not in it" in said["message"] and not said["takes_signals"], said
trainer.train(2)
assert here.same(model, here.expected(trainer)), "no byte was written"
said = signal("t4")
assert not said["ok"] and "is not known here" in said["message"], said
weight_hook.load(model, trainer.order("t5", whole=True))
assert here.report(model)["takes_signals"]
print("lives", flush=True)
"""

FAILS_HALF_WAY = """
plan = weight_hook._states[model].plan
plan.large.append((plan.small[0][0][0], "no tensor"))
signal("t3")
print("lives", flush=True)
"""

ANOTHER_MODEL = """
draft = here.Shard()
weight_hook.load(draft, trainer.order("t3", whole=True))
weight_hook.load(model, trainer.order("t3", whole=True))
assert not here.report(model)["takes_signals"], "a signal would reach one of them"
print("lives", flush=True)
"""


SEVERAL_RANKS = """
weight_hook._num_ranks = lambda: 2
assert not here.report(model)["takes_signals"], "a signal would reach one of them"
print("lives", flush=True)
"""

NO_PLAN = """
weight_hook._states[model].plan.refused = "its loader does aten.mul"
assert not here.report(model)["takes_signals"]
said = signal("t3")
assert not said["ok"] and "a signal is for a plan" in said["message"], said
print("lives", flush=True)
"""


@pytest.mark.parametrize(
    "then",
    [REFUSES, ANOTHER_MODEL, SEVERAL_RANKS, NO_PLAN],
    ids=["refuses", "another model", "several ranks", "no plan"],
)
def test_a_signal_is_done_whole_or_refused(then: str):
    done = alone(ALONE + then)
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr


def test_a_signal_that_fails_half_way_ends_its_engine():
    """Which was not paused for it, and would generate with that (ADR 25)."""
    done = alone(ALONE + FAILS_HALF_WAY)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "weights were written in part: this engine ends" in done.stderr
    assert "no tensor" in done.stderr or "Traceback" in done.stderr


def alone(script: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a process of its own, which has no model but that of the script."""
    command = [sys.executable, "-c", script]
    here = Path(__file__).parent
    return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=300, check=False)
