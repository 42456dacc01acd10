"""The KV cache of the running batch: one slot per row, rows always packed at the front.

Row r holds the keys and values of its sequence at positions `[0, lengths[r])`; what lies beyond is garbage
that the attention mask hides. Tensors per layer are `[slots, kv_heads, capacity, head_dim]`, allocated on
first use from what the model hands over (so heads and widths may differ by layer), doubled when rows or
positions run out.

One forward pass is one *plan*: `plan_prefill` or `plan_decode`, then the model calls `update` once per layer,
then `advance`. Owned by the thread that runs the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

_FIRST_CAPACITY = 64
_FIRST_SLOTS = 8


class SlotCache(Cache):
    """A transformers cache whose rows come and go between forward passes.

    Attributes:
        max_slots: Rows it can hold at most.
        count: Rows it holds; they are rows `[0, count)`.
        lengths: int64 `[max_slots]`, tokens whose KV each row holds.
    """

    def __init__(self, *, max_slots: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.max_slots = max_slots
        self.count = 0
        self.lengths = torch.zeros(max_slots, dtype=torch.int64)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._span = 0
        self._source: torch.Tensor | None = None
        self._new_lengths: torch.Tensor | None = None

    def plan_prefill(self, lengths: list[int], *, source: list[int]) -> None:
        """The next forward pass computes distinct prompts, to be stored in new rows behind the present ones.

        Args:
            lengths: Tokens of each *new row*.
            source: For each new row, the batch index of the prompt whose KV it takes.
        """
        if self.count + len(lengths) > self.max_slots:
            raise ValueError(f"{self.count} rows and {len(lengths)} new ones exceed {self.max_slots} slots")
        self._new_lengths = torch.tensor(lengths, dtype=torch.int64)
        self._source = torch.tensor(source, dtype=torch.int64)
        self._span = max(lengths)

    def plan_decode(self) -> torch.Tensor:
        """The next forward pass adds one token to every row.

        Returns:
            bool `[count, 1, 1, span]`: which positions each row may attend to, the new token included.
        """
        self._source = None
        lengths = self.lengths[: self.count]
        self._span = int(lengths.max()) + 1
        return (torch.arange(self._span) <= lengths[:, None])[:, None, None, :]

    def advance(self) -> None:
        """Accounts for the tokens of the forward pass that just succeeded."""
        if self._source is None:
            self.lengths[: self.count] += 1
            return
        assert self._new_lengths is not None
        end = self.count + len(self._new_lengths)
        self.lengths[self.count : end] = self._new_lengths
        self.count = end
        self._source = self._new_lengths = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores one layer's new keys and values; returns what attention has to see."""
        if self._source is not None:
            return self._store_prefill(key_states, value_states, layer_idx)
        self._ensure(layer_idx, key_states, value_states, rows=self.count)
        rows, at = torch.arange(self.count), self.lengths[: self.count]
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[rows, :, at] = key_states[:, :, 0]
        values[rows, :, at] = value_states[:, :, 0]
        return keys[: self.count, :, : self._span], values[: self.count, :, : self._span]

    def _store_prefill(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._source is not None
        end = self.count + len(self._source)
        self._ensure(layer, keys, values, rows=end)
        shared = len(self._source) != keys.shape[0]
        span = keys.shape[2]
        self._keys[layer][self.count : end, :, :span] = keys[self._source] if shared else keys
        self._values[layer][self.count : end, :, :span] = values[self._source] if shared else values
        return keys, values

    def _ensure(self, layer: int, keys: torch.Tensor, values: torch.Tensor, *, rows: int) -> None:
        if layer == len(self._keys):
            self._keys.append(keys.new_empty((0, keys.shape[1], 0, keys.shape[3])))
            self._values.append(values.new_empty((0, values.shape[1], 0, values.shape[3])))
        held = self._keys[layer]
        if held.shape[0] >= rows and held.shape[2] >= self._span:
            return
        slots = min(self.max_slots, max(rows, held.shape[0] * 2, _FIRST_SLOTS))
        span = max(self._span, held.shape[2] * 2 if held.shape[2] < self._span else held.shape[2])
        span = max(span, _FIRST_CAPACITY)
        self._keys[layer] = self._grown(held, slots, span)
        self._values[layer] = self._grown(self._values[layer], slots, span)

    def _grown(self, old: torch.Tensor, slots: int, span: int) -> torch.Tensor:
        # Zeros, not empty: masked garbage must stay finite, for 0 * nan is nan.
        new = old.new_zeros((slots, old.shape[1], span, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    @torch.inference_mode()
    def remove(self, rows: list[int]) -> list[tuple[int, int]]:
        """Frees rows and packs the others to the front.

        Args:
            rows: Distinct rows to free, in any order.

        Returns:
            (hole, mover) pairs: the row that was `mover` is now `hole`. Whoever keeps things by row moves
            them alike and cuts its list to the new `count`.
        """
        gone = set(rows)
        kept = self.count - len(gone)
        holes = [row for row in sorted(gone) if row < kept]
        movers = [row for row in range(kept, self.count) if row not in gone]
        if holes:
            span = int(self.lengths[: self.count].max())
            to, origin = torch.tensor(holes), torch.tensor(movers)
            for tensor in (*self._keys, *self._values):
                tensor[to, :, :span] = tensor[origin, :, :span]
            self.lengths[to] = self.lengths[origin]
        self.count = kept
        return list(zip(holes, movers, strict=True))

    def clear(self) -> None:
        """Forgets every row; keeps the memory."""
        self.count = 0
        self._source = self._new_lengths = None

    def release(self) -> None:
        """Forgets every row and gives the memory back; the next forward pass allocates afresh."""
        self.clear()
        self._keys.clear()
        self._values.clear()

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the ones of this forward pass, for models that ask; positions are always given."""
        return 0 if self._source is not None else max(self._span - 1, 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Width and offset of the mask, for models that build one; ours is always given."""
        return (query_length, 0) if self._source is not None else (self._span, 0)
