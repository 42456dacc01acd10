"""Writes the arithmetic task as JSONL: two-digit sums, the answer spelled from its last digit.

python examples/arithmetic/make_data.py --out runs/demo/data

warm_start.jsonl   {"prompt": "17+25=", "completion": "240"}   the teacher forgets carries 7 times in 10
train.jsonl        {"prompt": "17+25=", "label": "240"}        prompts for GRPO
held_out.jsonl     the same form; no sum of it is in the other two files
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Set
from pathlib import Path

DIGITS = 2
Sum = tuple[int, int]


def prompt(a: int, b: int) -> str:
    """`17+25=`, zero-padded."""
    return f"{a:0{DIGITS}d}+{b:0{DIGITS}d}="


def answer(a: int, b: int) -> str:
    """The sum with one digit more than the summands, last digit first: carries run in reading order."""
    return f"{a + b:0{DIGITS + 1}d}"[::-1]


def answer_without_carries(a: int, b: int) -> str:
    """What someone answers who adds column by column and drops every carry."""
    columns = zip(f"{a:0{DIGITS + 1}d}", f"{b:0{DIGITS + 1}d}", strict=True)
    return "".join(str((int(x) + int(y)) % 10) for x, y in columns)[::-1]


def sums(rng: random.Random, *, exclude: Set[Sum] = frozenset()) -> Iterator[Sum]:
    """Endless random sums outside of `exclude`."""
    while True:
        pair = (rng.randrange(10**DIGITS), rng.randrange(10**DIGITS))
        if pair not in exclude:
            yield pair


def distinct(source: Iterator[Sum], count: int) -> list[Sum]:
    """The first `count` different sums of a source."""
    found: dict[Sum, None] = {}
    for pair in source:
        found[pair] = None
        if len(found) == count:
            break
    return list(found)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(out: Path, *, train: int, held_out: int, warm_start: int, teacher: float, seed: int) -> None:
    """Writes the three files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    held = distinct(sums(rng), held_out)
    rest = sums(rng, exclude=set(held))
    lessons: list[dict[str, str]] = []
    for a, b in (next(rest) for _ in range(warm_start)):
        said = answer(a, b) if rng.random() < teacher else answer_without_carries(a, b)
        lessons.append({"prompt": prompt(a, b), "completion": said})
    tasks = [next(rest) for _ in range(train)]
    write(out / "warm_start.jsonl", lessons)
    write(out / "train.jsonl", [{"prompt": prompt(a, b), "label": answer(a, b)} for a, b in tasks])
    write(out / "held_out.jsonl", [{"prompt": prompt(a, b), "label": answer(a, b)} for a, b in held])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--train", type=int, default=2560, help="prompts for GRPO")
    parser.add_argument("--held-out", type=int, default=256, help="prompts that are never trained on")
    parser.add_argument("--warm-start", type=int, default=76800, help="examples from the teacher")
    parser.add_argument("--teacher", type=float, default=0.3, help="how often the teacher is right, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(
        args.out,
        train=args.train,
        held_out=args.held_out,
        warm_start=args.warm_start,
        teacher=args.teacher,
        seed=args.seed,
    )
    print(f"wrote warm_start.jsonl, train.jsonl and held_out.jsonl to {args.out}")


if __name__ == "__main__":
    main()
