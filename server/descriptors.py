"""What the host tells the device of a step: which rows there are, in one array and one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rae.server.in_flight import RUN_AHEAD

INTEGERS = (
    "slots",  # of each row of the model: whose latents it reads
    "labels",
    "kept",  # where the row's conditioning is kept, if it is
    "targets",  # the slot that a row updates, or -1 for a second branch or a pad
    "weak_rows",  # as `guided_euler` takes them
    "guide_slots",
    "guide_labels",
    "guide_kept",
)
FLOATS = ("t", "dt", "scales", "guide_t")


class Descriptors:
    """Arrays (capacity,) by name: `write` gives numpy's on the host, `read` torch's on the device.

    On CUDA the host has `RUN_AHEAD` pinned copies, so that it writes one while the device reads
    another; on a CPU both sides are one memory.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        num_bytes = capacity * (8 * len(INTEGERS) + 4 * len(FLOATS))
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        pins = device.type == "cuda"
        self._hosts = [
            torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pins) for _ in range(RUN_AHEAD)
        ]
        if device.type == "cpu":
            self._hosts = [self._device]
        self._arrays = [
            {name: part.numpy() for name, part in views(host, capacity).items()}
            for host in self._hosts
        ]
        self._turn = 0
        self.read = views(self._device, capacity)

    @property
    def write(self) -> dict[str, np.ndarray]:
        """What was sent RUN_AHEAD times ago: the step that read it must be over."""
        return self._arrays[self._turn]

    def send(self) -> None:
        """Copy what was written, in the order of the stream; the next `write` is another."""
        host = self._hosts[self._turn]
        if host is not self._device:
            self._device.copy_(host, non_blocking=host.is_pinned())
        self._turn = (self._turn + 1) % len(self._hosts)


def views(buffer: Tensor, capacity: int) -> dict[str, Tensor]:
    """The parts of an array of bytes, (capacity,) each."""
    integers = buffer[: 8 * capacity * len(INTEGERS)].view(torch.int64).split(capacity)
    floats = buffer[8 * capacity * len(INTEGERS) :].view(torch.float32).split(capacity)
    return dict(zip((*INTEGERS, *FLOATS), (*integers, *floats), strict=True))


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(len(values),) on the device. On CUDA by pinned memory: any other copy would wait for all
    steps that were sent."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
