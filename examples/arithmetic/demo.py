"""The whole loop on one machine: warm start, asynchronous GRPO, accuracy before and after, ledger audit.

    python examples/arithmetic/demo.py            (or `make demo`)

    make_data, make_model -> milepost trainer sft -> milepost up (buffer, router, 2 engines, rollout, trainer)
        -> evaluate -> milepost feed -> ... steps ... -> evaluate -> audit -> runs/demo/summary.json

Everything goes through the public command and clients; this file only plays the user.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

from milepost import BufferClient, RolloutClient, TrainerClient
from milepost.errors import MilepostError
from milepost.types import AuditReport, Evaluation, StepMetrics

HERE = Path(__file__).resolve().parent
CONFIG = HERE / "milepost.toml"
RUN_DIR = Path("runs/demo")
RUN_ID = "demo"
MILEPOST = (str(Path(sys.executable).with_name("milepost")),)
READY_S, RUN_S, STOP_S = 120.0, 900.0, 60.0


def say(text: str) -> None:
    """One line of progress."""
    print(text, flush=True)


def call(*command: str | Path) -> None:
    """Runs a command to its end; its failure is ours."""
    subprocess.run([str(c) for c in command], check=True, timeout=RUN_S)


def prepare(prompts: int) -> None:
    """Data, a model with random weights, and its warm start."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    call(sys.executable, HERE / "make_data.py", "--out", RUN_DIR / "data", "--train", str(prompts))
    call(sys.executable, HERE / "make_model.py", "--out", RUN_DIR / "model")
    call(*MILEPOST, "trainer", "sft", "--config", CONFIG, "--model_dir", RUN_DIR / "model")


@contextmanager
def stack() -> Generator[subprocess.Popen[bytes]]:
    """`milepost up`, stopped at the end whatever happens."""
    up = subprocess.Popen([*MILEPOST, "up", "--config", str(CONFIG), "--stay", "--ports", "free"])
    try:
        yield up
    finally:
        up.send_signal(signal.SIGINT)
        try:
            up.wait(STOP_S)
        except subprocess.TimeoutExpired:
            up.kill()
            up.wait()


async def addresses(up: subprocess.Popen[bytes]) -> Mapping[str, str]:
    """gRPC address of each service, once all are ready."""
    async with asyncio.timeout(READY_S):
        while True:
            if up.poll() is not None:
                raise SystemExit(f"milepost up ended with {up.returncode}; see {RUN_DIR}/logs")
            with contextlib.suppress(FileNotFoundError):
                state: dict[str, Any] = json.loads((RUN_DIR / "up.json").read_text())
                services = cast(dict[str, dict[str, Any]], state["services"])
                if all(s["state"] == "ready" for s in services.values()):
                    return {
                        n: s["addresses"]["grpc"] for n, s in services.items() if "grpc" in s["addresses"]
                    }
            await asyncio.sleep(0.1)


async def until_published(buffer: BufferClient) -> None:
    """Waits until the first weights are on the engines."""
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(MilepostError):
                if (await buffer.get_run(RUN_ID)).weight_version:
                    return
            await asyncio.sleep(0.1)


@asynccontextmanager
async def feeding(buffer: str) -> AsyncGenerator[None]:
    """`milepost feed`, the public client, beside what follows."""
    command = [*MILEPOST, "feed", RUN_DIR / "data" / "train.jsonl", "--run", RUN_ID, "--buffer", buffer]
    witness = ["--acknowledged", RUN_DIR / "acknowledged.jsonl"]
    log = (RUN_DIR / "logs" / "feed.log").open("wb")
    with log:
        feed = await asyncio.create_subprocess_exec(*map(str, [*command, *witness]), stdout=log, stderr=log)
        try:
            yield
            async with asyncio.timeout(STOP_S):
                if await feed.wait():
                    raise SystemExit(f"milepost feed failed; see {RUN_DIR}/logs/feed.log")
        finally:
            if feed.returncode is None:
                feed.kill()


async def follow(trainer: TrainerClient, buffer: BufferClient) -> tuple[list[StepMetrics], float]:
    """Prints each step until the run is finished; returns the steps and the seconds that training took."""
    steps: list[StepMetrics] = []
    started = time.monotonic()
    ended = started
    async with asyncio.timeout(RUN_S):
        while True:
            with contextlib.suppress(MilepostError):
                async for step in trainer.watch_steps(after_step=steps[-1].step if steps else 0):
                    steps.append(step)
                    ended = time.monotonic()
                    say(line_of(step))
            if (await buffer.get_run(RUN_ID)).finished:
                return steps, ended - started
            await asyncio.sleep(0.2)


def line_of(step: StepMetrics) -> str:
    """One step in one line; what a step lacks (a reward, a finite gradient) is a dash."""

    def value(name: str, form: str) -> str:
        number = step.metrics.get(name)
        return "-" if number is None else format(number, form)

    return (
        f"step {step.step:3d}  reward {value('rollout/raw_reward', '.3f')}  "
        f"loss {value('train/loss', '+.4f')}  grad norm {value('train/grad_norm', '.2f')}  "
        f"staleness {value('milepost/step_staleness_max', '.0f')}  "
        f"{value('milepost/step_tokens_per_s', '.0f')} tokens/s  "
        f"wait {value('perf/train_wait_time', '.2f')} s  train {value('perf/train_time', '.2f')} s  "
        f"publish {value('perf/update_weights_time', '.2f')} s"
    )


async def evaluate(rollout: RolloutClient, when: str) -> Evaluation:
    """Greedy accuracy on the held-out prompts."""
    result = await rollout.evaluate()
    if result.num_scored != result.num_requested:
        raise SystemExit(
            f"evaluation {when}: {result.num_scored} of {result.num_requested} scored: {result.failures}"
        )
    say(
        f"greedy accuracy on {result.num_scored} held-out prompts {when}: {result.reward_mean:.3f} "
        f"(weight version {result.weight_version}, step {result.weight_label})"
    )
    return result


async def train() -> dict[str, Any]:
    """Everything that needs the stack."""
    with stack() as up:
        at = await addresses(up)
        async with (
            BufferClient(at["buffer"]) as buffer,
            RolloutClient(at["rollout"]) as rollout,
            TrainerClient(at["trainer"]) as trainer,
        ):
            await until_published(buffer)
            before = await evaluate(rollout, "after the warm start")
            async with feeding(at["buffer"]):
                steps, seconds = await follow(trainer, buffer)
            after = await evaluate(rollout, "after GRPO")
            ledger = [*MILEPOST, "ledger", "--run", RUN_ID, "--buffer", at["buffer"], "--audit"]
            say("")
            call(*ledger, "--witness", RUN_DIR)
            return summary(before, after, steps, seconds, await buffer.audit_ledger(RUN_ID))


def summary(
    before: Evaluation, after: Evaluation, steps: list[StepMetrics], seconds: float, audit: AuditReport
) -> dict[str, Any]:
    """What goes into summary.json."""
    return {
        "accuracy_before": before.reward_mean,
        "accuracy_after": after.reward_mean,
        "held_out_prompts": after.num_scored,
        "train_seconds": round(seconds, 1),
        "steps": steps[-1].step,
        "weight_version": after.weight_version,
        "max_staleness_seen": audit.max_staleness_seen,
        "ledger": {
            "accepted": audit.accepted,
            "trained": audit.trained,
            "dropped": dict(audit.dropped),
            "in_flight": audit.in_flight,
            "lost": audit.lost,
            "twice": audit.twice,
        },
    }


def plot(path: Path) -> None:
    """Reward by step, from metrics.jsonl."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (RUN_DIR / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in rows], [r["rollout/raw_reward"] for r in rows], marker=".")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1), title="Two-digit sums, asynchronous GRPO")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Command line; fails when the model has not learned or the audit does not close."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2560, help="prompts fed, 32 a step")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    prepare(args.prompts)
    say(f"data, model and warm start took {time.monotonic() - started:.0f} s\n")
    result = asyncio.run(train())
    plot(RUN_DIR / "reward.png")
    (RUN_DIR / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
    say(f"\n{json.dumps(result, indent=2)}\n")
    say(f"wrote {RUN_DIR}/metrics.jsonl, reward.png and summary.json in {time.monotonic() - started:.0f} s")
    return verdict(result)


def verdict(result: Mapping[str, Any]) -> int:
    """0 when the demo shows what it is to show."""
    ledger = result["ledger"]
    closes = ledger["accepted"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"]
    learned = result["accuracy_before"] <= 0.5 and result["accuracy_after"] >= 0.9
    return 0 if closes and learned and not ledger["lost"] and not ledger["twice"] else 1


if __name__ == "__main__":
    sys.exit(main())
