"""The trainer's fast path on CUDA; skipped where there is none. No engine, no other service."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run."""
    for item in items:
        if "gpu_trainer" in str(item.path) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
