"""Which numbers a training step multiplies in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae.training.run_settings import Precision


def set_matmul_precision(precision: Precision) -> None:
    """For this process: fp32 matmuls and convolutions of a GPU in TF32 or not.

    Raises ValueError for another precision.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r}; known: {', '.join(get_args(Precision))}")
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def autocast(device: torch.device, precision: Precision) -> Iterator[None]:
    """Around a forward. Weights, gradients and moments stay fp32.

    On a CPU attention is written out, around the backward too: that of torch's fused one takes
    14 ms per layer of 128 × 16 tokens, half of a step (2 cores).
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        if device.type != "cpu":
            yield
            return
        with sdpa_kernel(SDPBackend.MATH):
            yield
