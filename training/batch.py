"""What a loader yields: the samples of one micro-batch of one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`positions` (B,) are places in the endless stream of samples, which all randomness follows
    from; `class_labels` (B,) int64; `images` (B, 3, S, S) uint8 or `latents` (B, C, h, w) as the
    encoder gives them. `unreadable` says which images were replaced or left out, by their number
    in the data set, and what is wrong with them.
    """

    positions: Tensor
    class_labels: Tensor
    images: Tensor | None = None
    latents: Tensor | None = None
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @property
    def num_skipped(self) -> int:
        return len(self.unreadable)

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Self:
        """But for the positions: whoever draws by them would wait for the device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in self._tensors().items()
            if name != "positions"
        }
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        return replace(
            self, **{name: value.pin_memory() for name, value in self._tensors().items()}
        )

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
