"""Conditionings that are kept: a row for each label and time, at one place on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.models.config import DiTDHConfig
from rae.models.dit_dh import Conditioning, DiTDH
from rae.server.descriptors import to_device

Key = tuple[int, float]
"""A class label, and a time that is a number of fp32."""

# A GEMM's kernel, and with it a row's last bits, may depend on how many rows there are: it is
# always as many. One evaluation for the published 49 steps.
CHUNK = 64


def bytes_per_row(config: DiTDHConfig, dtype: torch.dtype) -> int:
    """What one label at one time takes in the arena; DiTDH-XL in bf16: 389,376."""
    return config.hidden_size * (1 + 6 * config.depth) * dtype.itemsize


class ConditioningCache:
    """The conditioning of a model by class label and time, in an arena of `capacity` rows; the row
    that was used least recently is overwritten first.

    The arena never moves, so that a CUDA graph can gather from it. What is written is in the
    stream's order: a step that was sent before reads what was there before.

    Args:
        model: on `device`, in the form in which it runs.
        dtype: in which it multiplies, and what is kept.
    """

    def __init__(
        self, model: DiTDH, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        width, depth = model.config.hidden_size, model.config.depth
        self.capacity = capacity
        # Not zeros: memory that no row has used yet is none of the process's on a CPU.
        self.time = torch.empty(capacity, width, device=device, dtype=dtype)
        self.modulations = torch.empty(capacity, depth, 6 * width, device=device, dtype=dtype)
        self.hits = self.misses = 0
        self._model = model
        self._rows: OrderedDict[Key, int] = OrderedDict()  # the least recently used first
        self._empty = list(reversed(range(capacity)))

    @torch.inference_mode()
    def rows(self, keys: Sequence[Key]) -> list[int]:
        """The row of each key, at most `capacity` different ones. They stay until others are asked
        for; what is missing is evaluated at once."""
        wanted = dict.fromkeys(keys)
        assert len(wanted) <= self.capacity
        missing = [key for key in wanted if key not in self._rows]
        for key in wanted:
            if key in self._rows:
                self._rows.move_to_end(key)
        if missing:
            values = self._evaluate(missing)
            places = [self._take() for _ in missing]
            try:
                index = to_device(places, torch.int64, self.time.device)
                self.time.index_copy_(0, index, values.time)
                self.modulations.index_copy_(0, index, values.modulations)
            except BaseException:
                self._empty += places
                raise
            self._rows.update(zip(missing, places, strict=True))
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        return [self._rows[key] for key in keys]

    def _take(self) -> int:
        """An empty row, or the least recently used."""
        return self._empty.pop() if self._empty else self._rows.popitem(last=False)[1]

    def gather(self, rows: Tensor) -> Conditioning:
        """The conditioning of rows (B,) int64, which are on the device; a copy."""
        time, modulations = self.time, self.modulations
        return Conditioning(time.index_select(0, rows), modulations.index_select(0, rows))

    def _evaluate(self, keys: Sequence[Key]) -> Conditioning:
        device, dtype = self.time.device, self.time.dtype
        pad = (0, -len(keys) % CHUNK)
        labels = F.pad(to_device([label for label, _ in keys], torch.int64, device), pad)
        t = F.pad(to_device([t for _, t in keys], torch.float32, device), pad)
        chunks = zip(t.split(CHUNK), labels.split(CHUNK), strict=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            parts = [self._model.condition(*chunk) for chunk in chunks]
        time, modulations = (torch.cat(values)[: len(keys)] for values in zip(*parts, strict=True))
        return Conditioning(time, modulations)
