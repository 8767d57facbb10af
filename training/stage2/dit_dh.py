"""Stage 2: a diffusion transformer on the normalised latents of a frozen RAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rae.models.rae import RAE
from rae.models.sampling import VelocityModel, shift_time
from rae.training.batch import Batch
from rae.training.draws import generators
from rae.training.learner import Learner
from rae.training.precision import Precision, autocast
from rae.training.stage2.losses import logit_normal_quantile, velocity_loss

DRAWS = 2
"""The purpose of these random numbers, apart from the crops and flips of images."""


class StepDraws(NamedTuple):
    """What is random in a step: times (B,), dropped labels (B,) bool, noise (B, C, H, W)."""

    t: Tensor
    dropped: Tensor
    noise: Tensor


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """The objective: `shift` of times, the share of labels dropped for guidance.

    Raises ValueError for a shift that is not positive.
    """

    shift: float
    null_label: int
    class_dropout_prob: float
    seed: int

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift {self.shift} is not positive")

    def draw(
        self, positions: Tensor, latent_shape: Sequence[int], device: torch.device
    ) -> StepDraws:
        """Of each sample by its position (B,) alone, fp32."""
        uniform = torch.empty(len(positions), 2, device=device)
        noise = torch.empty(len(positions), *latent_shape, device=device)
        # In place: a stack of 256 × 768 × 16 × 16 is 6 % of the draws' time (CPU).
        for index, rng in enumerate(generators(device, self.seed, positions, DRAWS)):
            uniform[index].uniform_(generator=rng)
            noise[index].normal_(generator=rng)
        return StepDraws(
            t=shift_time(logit_normal_quantile(uniform[:, 0]), self.shift),
            dropped=uniform[:, 1] < self.class_dropout_prob,
            noise=noise,
        )

    def loss(
        self, model: VelocityModel, latents: Tensor, class_labels: Tensor, draws: StepDraws
    ) -> Tensor:
        """Mean squared error of the velocity, 0-d; latents (B, C, H, W) normalised."""
        labels = class_labels.masked_fill(draws.dropped, self.null_label)
        return velocity_loss(model, latents, draws.noise, draws.t, labels).mean()


class DiTTask:
    """What a Trainer trains in stage 2. `rae` encodes images and normalises latents; its
    statistics are those that the samples are decoded with."""

    def __init__(
        self,
        learner: Learner[nn.Module],
        objective: FlowMatching,
        rae: RAE,
        *,
        precision: Precision = "fp32",
        draw_samples: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        self.learners: Mapping[str, Learner[nn.Module]] = {"dit": learner}
        self.learner, self.objective, self.rae = learner, objective, rae
        self.precision: Precision = precision
        self.draw_samples = draw_samples

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update on the mean loss over all samples of `batches`, and of all processes."""
        learner, losses = self.learner, []
        learner.module.train()
        lr = learner.lr
        for index, batch in enumerate(batches):
            latents = self.latents(batch)
            draws = self.objective.draw(batch.positions, latents.shape[1:], latents.device)
            with (
                learner.micro_batch(is_last=index == len(batches) - 1),
                autocast(latents.device, self.precision),
            ):
                loss = self.objective.loss(learner.parallel, latents, batch.class_labels, draws)
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        return {"loss": loss, "grad_norm": learner.update(), "lr": loss.new_tensor(lr)}

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Normalised (B, C, h, w), fp32, of images or of what the encoder made of them before."""
        if batch.images is not None:
            return self.rae.encode(batch.images.float() / 255)
        assert batch.latents is not None
        return self.rae.normalise(batch.latents.float())

    def samples(self) -> Tensor | None:
        """Images (N, 3, H, W) in [0, 1] by the averaged weights, where they are asked for."""
        if self.draw_samples is None:
            return None
        with self.learner.averaged() as module:
            return self.draw_samples(module)
