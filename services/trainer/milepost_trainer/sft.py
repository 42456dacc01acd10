"""Supervised warm start: (prompt, completion) lines of a file -> a Hugging Face folder. No other service
needed.

    {"prompt": "12+34=", "completion": "64"}      prompt: text, or a list of chat messages
                                                  other keys are ignored

Every rank reads the file and trains its share of each batch through the same learner, packing and optimizer
as reinforcement learning. A malformed line is named by its number and skipped.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from milepost.errors import InvalidArgument, MilepostError
from milepost_trainer.batch import TrainSequence
from milepost_trainer.learner import Learner, TrainGroup, UpdateReport
from milepost_trainer.plan import GroupInfo, plan_step
from milepost_trainer.service import FAILED, OK, build_learner
from milepost_trainer.settings import ScheduleSettings, SftSettings, TrainerSettings
from milepost_trainer.world import leave

log = logging.getLogger(__name__)

_REPORTS = 10  # lines of progress


async def train(settings: TrainerSettings, stop: asyncio.Event) -> int:
    """Train and export; returns the exit status. A stop exports what there is."""
    try:
        await asyncio.to_thread(_train, sft_settings(settings), stop)
    except (MilepostError, OSError) as error:
        log.error("%s", error)
        return FAILED
    return OK


def sft_settings(settings: TrainerSettings) -> TrainerSettings:
    """The trainer's settings with objective, rate and schedule of the warm start."""
    sft = settings.sft
    for name in ("data", "output_dir"):
        if not getattr(sft, name):
            raise InvalidArgument(f"trainer.sft.{name} is empty: give it in [trainer.sft] or as --sft.{name}")
    optimizer = settings.optimizer.model_copy(update={"lr": sft.lr} if sft.lr else {})
    schedule = ScheduleSettings(
        kind=sft.schedule if sft.num_steps > sft.warmup_updates else "constant",
        warmup_updates=sft.warmup_updates,
        total_updates=sft.num_steps,
    )
    objective = settings.objective.model_copy(update={"algorithm": "sft", "entropy": False})
    changes = {"optimizer": optimizer, "schedule": schedule, "objective": objective}
    return settings.model_copy(update=changes)


def _train(settings: TrainerSettings, stop: asyncio.Event) -> None:
    world, learner = build_learner(settings)
    try:
        sequences = read_data(Path(settings.sft.data), tokenizer=_tokenizer(settings), settings=settings.sft)
        batches = shuffled_batches(len(sequences), size=settings.sft.batch_size, seed=settings.seed)
        metrics = _Metrics(Path(settings.metrics.dir) if world.leads else None)
        for step in range(1, settings.sft.num_steps + 1):
            report = train_batch(learner, [sequences[i] for i in next(batches)], step, settings)
            metrics.write(step, report)
            if world.leads and step % max(1, settings.sft.num_steps // _REPORTS) == 0:
                log.info("step %d of %d: loss %.4f", step, settings.sft.num_steps, report.loss)
            if world.sum([float(stop.is_set())])[0]:
                break
        learner.backend.export_hf(Path(settings.sft.output_dir))
        if world.leads:
            log.info("model in %s", settings.sft.output_dir)
    finally:
        leave(world)


def train_batch(
    learner: Learner, batch: Sequence[TrainSequence], step: int, settings: TrainerSettings
) -> UpdateReport:
    """One optimizer update over a batch; each sequence is a group of its own."""
    infos = [GroupInfo(str(i), (len(sequence.tokens),)) for i, sequence in enumerate(batch)]
    world = learner.backend.world
    plan = plan_step(
        step,
        infos,
        num_ranks=world.size,
        updates=1,
        max_tokens=settings.max_tokens_per_micro_batch,
    )
    groups = {str(i): TrainGroup(np.ones(1), (sequence,)) for i, sequence in enumerate(batch)}
    learner.start_step(plan, {name: groups[name] for name in plan.prompt_ids_of(world.rank)})
    return learner.make_update(0)


def shuffled_batches(count: int, *, size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indexes of batches without end: each epoch a permutation of its own, batches run over its border."""
    rng = np.random.default_rng(seed)
    left = np.zeros(0, dtype=np.int64)
    while True:
        while left.size < size:
            left = np.concatenate([left, rng.permutation(count)])
        yield left[:size]
        left = left[size:]


def read_data(path: Path, *, tokenizer: Any, settings: SftSettings) -> list[TrainSequence]:
    """Tokenize a file.

    Raises:
        InvalidArgument: the file is missing, or holds no usable line.
    """
    if not path.is_file():
        raise InvalidArgument(
            f"trainer.sft.data is {path}: there is no such file; give the path of a JSONL file"
        )
    sequences: list[TrainSequence] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                sequences.append(_sequence(line, tokenizer, settings))
            except ValueError as error:
                log.warning("%s line %d skipped: %s", path, number, error)
    if not sequences:
        raise InvalidArgument(
            f"trainer.sft.data is {path}: no line of it can be used; each needs a prompt and a completion"
        )
    return sequences


def _sequence(line: str, tokenizer: Any, settings: SftSettings) -> TrainSequence:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is not an object")
    fields = cast(dict[str, Any], row)
    completion = fields.get("completion")
    if not isinstance(completion, str) or not completion:
        raise ValueError(f"completion is {completion!r}: give a string that is not empty")
    prompt = _prompt_ids(fields.get("prompt"), tokenizer)
    answer: list[int] = tokenizer.encode(completion, add_special_tokens=False)
    eos: int | None = tokenizer.eos_token_id
    if settings.append_eos and eos is not None and answer[-1:] != [eos]:
        answer = [*answer, eos]
    mask = np.zeros(len(prompt) + len(answer), np.uint8)
    mask[len(prompt) :] = 1
    return TrainSequence(
        tokens=np.array([*prompt, *answer], np.int32),
        loss_mask=mask,
        logprobs=np.zeros(len(mask), np.float32),
    )


def _prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str) and prompt:
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=True)
    elif isinstance(prompt, list) and prompt:
        ids = list(
            tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    else:
        raise ValueError(f"prompt is {prompt!r}: give a string or a list of messages, not empty")
    if not ids:
        raise ValueError("prompt has no tokens: nothing precedes the completion")
    return ids


def _tokenizer(settings: TrainerSettings) -> Any:
    try:
        return AutoTokenizer.from_pretrained(settings.model_dir)
    except (OSError, ValueError) as error:
        raise InvalidArgument(
            f"trainer.model_dir is {settings.model_dir}: no tokenizer can be loaded from it: {error}"
        ) from error


class _Metrics:
    """`sft_metrics.jsonl`; nothing on ranks that do not lead."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / "sft_metrics.jsonl"
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")

    def write(self, step: int, report: UpdateReport) -> None:
        """Append one line."""
        if self._path is not None:
            row = {
                "step": step,
                "train/loss": report.loss,
                "train/grad_norm": report.grad_norm,
                "train/lr-pg_0": report.learning_rate,
                "milepost/step_tokens": report.num_tokens,
                "milepost/step_skipped_updates": int(report.skipped),
                "train/oom_retries": report.oom_retries,
            }
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
