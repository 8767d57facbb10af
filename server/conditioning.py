"""Conditionings that are kept: a row for each label and time, at one place on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.models.config import DiTDHConfig
from rae.models.dit_dh import Conditioning, DiTDH

# A GEMM's kernel, and with it a row's last bits, may depend on how many rows there are: it is
# always as many. One evaluation for the published 49 steps.
CHUNK = 64


def bytes_per_row(config: DiTDHConfig, dtype: torch.dtype) -> int:
    """What one label at one time takes in the arena; DiTDH-XL in bf16: 389,376."""
    return config.hidden_size * (1 + 6 * config.depth) * dtype.itemsize


class ConditioningCache:
    """The conditioning of a model by (class label, time), in an arena of `capacity` rows.

    A row is pinned while an image that runs needs it; of the others, the least recently released
    is the first to be overwritten. The arena never moves, so that a CUDA graph can gather from it.
    For one thread, and one stream: that of the steps.

    Args:
        model: on `device`, in the form in which it runs.
        dtype: in which it multiplies, and what is kept.
    """

    def __init__(
        self, model: DiTDH, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        width, depth = model.config.hidden_size, model.config.depth
        self.time = torch.zeros(capacity, width, device=device, dtype=dtype)
        self.modulations = torch.zeros(capacity, depth, 6 * width, device=device, dtype=dtype)
        self.hits = self.misses = 0
        self._model = model
        self._rows: dict[tuple[int, float], int] = {}
        self._keys: list[tuple[int, float] | None] = [None] * capacity
        self._pins = [0] * capacity
        self._idle = OrderedDict.fromkeys(range(capacity))  # least recently released first

    @torch.inference_mode()
    def acquire(self, class_label: int, times: Sequence[float]) -> list[int] | None:
        """The row of each of `times`, numbers of fp32; pinned until `release`.

        What is missing is evaluated at once. None where the rows do not fit beside those that are
        pinned; nothing is changed or counted then.
        """
        keys = [(class_label, t) for t in times]
        missing = [key for key in dict.fromkeys(keys) if key not in self._rows]
        found = {self._rows[key] for key in keys if key in self._rows}
        if len(missing) > len(self._idle) - len(found & self._idle.keys()):
            return None
        labels, new_times = [class_label] * len(missing), [t for _, t in missing]
        values = self.evaluate(labels, new_times) if missing else None
        for row in found:
            self._idle.pop(row, None)
        if values is not None:
            index = torch.tensor([self._take(key) for key in missing], device=self.time.device)
            self.time.index_copy_(0, index, values.time)
            self.modulations.index_copy_(0, index, values.modulations)
        rows = [self._rows[key] for key in keys]
        for row in rows:
            self._pins[row] += 1
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        return rows

    def release(self, rows: Sequence[int]) -> None:
        """Give back what an `acquire` returned; its rows stay until their place is needed."""
        for row in rows:
            assert self._pins[row] > 0, f"row {row} is not pinned"
            self._pins[row] -= 1
            if not self._pins[row]:
                self._idle[row] = None

    def gather(self, rows: Tensor) -> Conditioning:
        """The conditioning of rows (B,) int64, which are on the device; a copy."""
        time, modulations = self.time, self.modulations
        return Conditioning(time.index_select(0, rows), modulations.index_select(0, rows))

    @torch.inference_mode()
    def evaluate(self, class_labels: Sequence[int], times: Sequence[float]) -> Conditioning:
        """The conditioning of one or more labels and times, not kept: the bits of `acquire`."""
        device, dtype = self.time.device, self.time.dtype
        labels = torch.tensor(class_labels, device=device)
        t = torch.tensor(times, dtype=torch.float32, device=device)
        pad = (0, -len(t) % CHUNK)
        chunks = zip(F.pad(t, pad).split(CHUNK), F.pad(labels, pad).split(CHUNK), strict=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            parts = [self._model.condition(*chunk) for chunk in chunks]
        time, modulations = (torch.cat(values)[: len(t)] for values in zip(*parts, strict=True))
        return Conditioning(time, modulations)

    def _take(self, key: tuple[int, float]) -> int:
        """Give `key` the row that was released least recently."""
        row, _ = self._idle.popitem(last=False)
        before = self._keys[row]
        if before is not None:
            del self._rows[before]
        self._keys[row], self._rows[key] = key, row
        return row
