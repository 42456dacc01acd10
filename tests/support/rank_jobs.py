"""Jobs of `rank_script.py` on any number of ranks, and the folder of a model to do them with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Qwen3Config

SCRIPT = Path(__file__).parent.parent / "integration" / "trainer" / "rank_script.py"
SHAPE: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}


def save_shape(path: Path, **changes: Any) -> Path:
    """Saves a model's config, from which weights are drawn, and what an export wants beside it."""
    Qwen3Config(**SHAPE | changes).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def do_jobs(
    jobs: Sequence[dict[str, Any]], ranks: int, *, timeout_s: float, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Does jobs one after another in fresh processes; `environ` is for them."""
    command = [str(SCRIPT), json.dumps(jobs)]
    if ranks > 1:
        # A name of this host that nobody resolves must not keep its ranks apart.
        alone = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
        command = ["-m", "torch.distributed.run", *alone, *command]
    return subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
