"""The published sampler, eager: the reference that every fast path is tested against.

t = 1 is noise and t = 0 is data; velocity = noise − latents. A grid of `num_steps` points has
`num_steps` − 1 intervals, and does not end at 0: τ ends at 0.001, before the shift.
Source: github bytetriper/RAE, `src/stage2/transport`; solvers as in torchdiffeq.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from rae.models.config import Solver
from rae.models.guidance import Guidance

VelocityModel = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(latents (B, C, H, W), t (B,), class_labels (B,)) -> velocity (B, C, H, W)."""

SHIFT_BASE = 4096
TAU_END = 0.001


def default_shift(latent_shape: Sequence[int]) -> float:
    """The dimension-dependent shift sqrt(C·H·W / 4096), at least 1 (arXiv 2510.11690, 4.3)."""
    return max(1.0, math.sqrt(math.prod(latent_shape) / SHIFT_BASE))


def shift_time(tau: Tensor, shift: float) -> Tensor:
    """τ in [0, 1] to the shifted time t = a·τ / (1 + (a − 1)·τ)."""
    return shift * tau / (1 + (shift - 1) * tau)


def timesteps(num_steps: int, shift: float) -> Tensor:
    """The published grid (num_steps,) in fp32, from t = 1 down.

    Raises ValueError for fewer than 2 points or a shift that is not positive.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps {num_steps}: a grid has at least 2 points, 1 evaluation")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift {shift} is not a positive number")
    return shift_time(1 - torch.linspace(0, 1 - TAU_END, num_steps), shift)


def draw_noise(latent_shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Noise (len(seeds), C, H, W), fp32 on the CPU: the same on every device and in every batch.

    Seeds are integers from 0 to 2^53; each has noise of its own.
    """
    return torch.stack([_noise_of(seed, latent_shape) for seed in seeds])


def _noise_of(seed: int, latent_shape: Sequence[int]) -> Tensor:
    if seed < 2**32:
        return torch.randn(*latent_shape, generator=torch.Generator().manual_seed(seed))
    # torch's CPU generator keeps 32 bits of a seed: 5 and 5 + 2^32 would be the same image.
    bits = np.random.MT19937(np.random.SeedSequence(seed))
    return torch.from_numpy(
        np.random.RandomState(bits).standard_normal(tuple(latent_shape))
    ).float()


def guided_velocity(
    model: VelocityModel,
    latents: Tensor,
    t: Tensor,
    class_labels: Tensor,
    guidance: Guidance,
    *,
    null_label: int | None = None,
    guide: VelocityModel | None = None,
) -> Tensor:
    """Guided velocity (B, C, H, W) in fp32. Rows outside the interval are evaluated once.

    `null_label` is needed by "cfg", `guide` by "autoguidance"; ValueError where it is missing.
    """
    velocity = model(latents, t, class_labels).float()
    rows = guidance.active(t).nonzero().flatten()
    if not len(rows):
        return velocity
    if guidance.method == "cfg":
        if null_label is None:
            raise ValueError("guidance method 'cfg' needs a model trained with a null label")
        weaker, labels = model, torch.full_like(class_labels[rows], null_label)
    else:
        if guide is None:
            raise ValueError("guidance method 'autoguidance' needs a guide model")
        weaker, labels = guide, class_labels[rows]
    weak = weaker(latents[rows], t[rows], labels).float()
    return velocity.index_copy(0, rows, weak + guidance.scale * (velocity[rows] - weak))


@torch.no_grad()
def denoise(
    model: VelocityModel,
    noise: Tensor,
    class_labels: Tensor,
    grid: Tensor,
    *,
    solver: Solver = "euler",
    guidance: Guidance | None = None,
    null_label: int | None = None,
    guide: VelocityModel | None = None,
) -> Tensor:
    """Integrate from noise (B, C, H, W) along `grid` (num_steps,); returns latents, fp32.

    euler evaluates once per interval; heun2 and midpoint twice. Raises ValueError for another
    solver.
    """
    guidance = guidance or Guidance()

    def velocity(latents: Tensor, t: Tensor) -> Tensor:
        return guided_velocity(
            model,
            latents,
            t.expand(len(latents)),
            class_labels,
            guidance,
            null_label=null_label,
            guide=guide,
        )

    latents, grid = noise.float(), grid.to(noise.device)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        dt = t_next - t
        match solver:
            case "euler":
                latents = latents + dt * velocity(latents, t)
            case "heun2":
                k1 = velocity(latents, t)
                k2 = velocity(latents + dt * k1, t_next)
                latents = latents + dt * (k1 + k2) / 2
            case "midpoint":
                middle = latents + dt / 2 * velocity(latents, t)
                latents = latents + dt * velocity(middle, t + dt / 2)
            case _:
                raise ValueError(f"solver {solver!r}; known: {', '.join(get_args(Solver))}")
    return latents


def to_uint8(images: Tensor, *, truncate: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to uint8, clamped; rounded, or truncated as published."""
    scaled = images.clamp(0, 1) * 255
    return (scaled if truncate else scaled.round()).to(torch.uint8)
