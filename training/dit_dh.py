"""Stage 2: DiT^DH on the normalised latents of the training set."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.models.config import DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.training.loop import OnStep, Plan, fit
from rae.training.losses import sample_times, velocity_loss


def drop_labels(
    class_labels: Tensor, null_label: int, probability: float, generator: torch.Generator
) -> Tensor:
    """Replace each label by the null label with this probability; (B,) int64."""
    dropped = torch.rand(len(class_labels), generator=generator) < probability
    return class_labels.masked_fill(dropped, null_label)


def train_dit_dh(
    config: DiTDHConfig,
    latents: Tensor,
    class_labels: Tensor,
    plan: Plan,
    generator: torch.Generator,
    *,
    shift: float,
    bf16: bool,
    on_step: OnStep,
) -> DiTDH:
    """On latents (M, C, H, W) that were computed once, with labels (M,)."""
    model = DiTDH(config)
    model.init_weights()

    def batch_loss(model: DiTDH) -> Tensor:
        rows = torch.randint(len(latents), (plan.batch_size,), generator=generator)
        batch, labels = latents[rows], class_labels[rows]
        if config.has_null_label:
            labels = drop_labels(labels, config.null_label, config.class_dropout_prob, generator)
        t = sample_times(len(rows), shift, generator)
        noise = torch.randn(batch.shape, generator=generator)
        return velocity_loss(model, batch, noise, t, labels).mean()

    return fit(model, batch_loss, plan, bf16=bf16, on_step=on_step)
