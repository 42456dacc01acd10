"""The random state that a try began with, so that the next try draws the same numbers."""

from __future__ import annotations

import torch


class RandomState:
    """Marks and restores the random state of host and device.

    Args:
        device: where the model draws.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marked: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def mark(self) -> None:
        """Remember the state as it is now, unless there is a mark already."""
        if self._marked is None:
            on_device = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
            self._marked = torch.get_rng_state(), on_device

    def restore(self) -> None:
        """Go back to the mark, which stays."""
        if self._marked is not None:
            host, on_device = self._marked
            torch.set_rng_state(host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self._device)

    def forget(self) -> None:
        """Take the mark away: what was drawn since counts."""
        self._marked = None
