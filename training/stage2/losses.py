"""The flow-matching loss of DiT^DH and its distribution of times (github bytetriper/RAE)."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.models.sampling import VelocityModel, shift_time

TAU_MAX = 0.999


def logit_normal_quantile(u: Tensor, *, high: float = TAU_MAX) -> Tensor:
    """Quantile function of the logit-normal(0, 1) truncated to [0, high]: u in [0, 1] to τ."""
    mass = torch.special.ndtr(torch.logit(torch.tensor(high, dtype=torch.float64, device=u.device)))
    return torch.sigmoid(torch.special.ndtri(u.double() * mass)).to(u.dtype)


def sample_times(num: int, shift: float, generator: torch.Generator | None = None) -> Tensor:
    """Training times (num,): logit-normal τ, then the shift."""
    return shift_time(logit_normal_quantile(torch.rand(num, generator=generator)), shift)


def interpolate(latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 − t)·latents + t·noise; t (B,)."""
    t = t.view(-1, *[1] * (latents.dim() - 1))
    return (1 - t) * latents + t * noise


def velocity_loss(
    model: VelocityModel, latents: Tensor, noise: Tensor, t: Tensor, class_labels: Tensor
) -> Tensor:
    """Mean squared error of the velocity noise − latents, per sample: (B,)."""
    velocity = model(interpolate(latents, noise, t), t, class_labels)
    return (velocity - (noise - latents)).square().flatten(1).mean(1)
