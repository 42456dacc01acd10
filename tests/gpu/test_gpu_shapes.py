"""Publication at the shape of a real model: what SGLang generates is what the trainer's weights say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_trainer import Trainer, generate, matches, publish

ROUNDS = 10


@pytest.mark.gpu(1)
@pytest.mark.timeout(600)
@pytest.mark.parametrize("bucket_mib", [256, 2048])
async def test_logprobs_are_the_trainers_after_each_publication_of_a_0_6b_shape(
    fleet: Any, small_model: Path, out: Path, bucket_mib: int
):
    trainer = await Trainer.next(small_model, fleet)
    async with trainer.publisher("cuda_ipc", bucket_bytes=bucket_mib << 20) as publisher:
        for seed in range(ROUNDS):
            trainer.perturb(seed, scale=0.002)
            torch.cuda.synchronize()
            published = await publish(publisher, trainer)
            reply, headers = await generate(trainer, version=published.version)
            assert headers["x-milepost-version-end"] == str(published.version)
            matches(trainer, reply)
    size = sum(x.nbytes for x in trainer.held.values())
    row = {"bucket_mib": bucket_mib, "bytes": size, "publish_s": trainer.seconds}
    (out / f"publish-0.6b-{bucket_mib}.json").write_text(json.dumps(row))


@pytest.fixture(scope="module")
def fleet(start_fleet: Any, small_model: Path) -> Any:
    """One launched engine."""
    return start_fleet(bare=False, model=small_model, skip_tokenizer_init=True)
