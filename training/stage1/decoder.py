"""Stage 1: the ViT decoder, on noised latents of a frozen encoder (arXiv 2510.11690, 4.2).

The loss is L1 + LPIPS + a weighted adversarial term; its parts are in `perceptual`,
`discriminator` and `adversarial`, its settings in `decoder_recipe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae.models.decoder import Decoder
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.draws import generators
from rae.training.learner import Learner
from rae.training.precision import Precision, autocast
from rae.training.stage1.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    last_layer_gradient,
)
from rae.training.stage1.diff_augment import diff_augment, draw_augmentation
from rae.training.stage1.discriminator import DiscriminatorHeads
from rae.training.stage1.features import FeatureMaps
from rae.training.stage1.perceptual import PerceptualLoss

# Purposes of random numbers, apart from each other and from those of data and of stage 2.
NOISE, AUGMENT_GENERATED, AUGMENT_FAKE, AUGMENT_REAL = 11, 12, 13, 14


@dataclass(frozen=True, kw_only=True)
class DecoderObjective:
    """Weights of the terms and the steps from which they count; see `DecoderRecipe`."""

    tau: float
    perceptual_weight: float
    perceptual_start: int
    discriminator_start: int
    adversarial_weight: float
    adversarial_start: int
    augment: bool
    seed: int

    def noise(self, positions: Tensor, tokens: Tensor) -> Tensor:
        """σ·N(0, I) with σ = τ·U(0, 1), of each sample by its position (B,): like `tokens`."""
        device = tokens.device
        drawn = [
            torch.rand((), generator=g, device=device)
            * torch.randn(tokens.shape[1:], generator=g, device=device)
            for g in generators(device, self.seed, positions, NOISE)
        ]
        return self.tau * torch.stack(drawn)

    def augmented(self, images: Tensor, positions: Tensor, purpose: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], in [−1, 1] and with DiffAugment where it is on."""
        images = 2 * images - 1
        if not self.augment:
            return images
        draws = draw_augmentation(generators("cpu", self.seed, positions, purpose))
        return diff_augment(images, draws)


class Adversary(NamedTuple):
    """The discriminator: frozen features and the heads that learn."""

    features: FeatureMaps
    heads: Learner[DiscriminatorHeads]


class Sample(NamedTuple):
    """Of a micro-batch: images (B, 3, S, S) in [0, 1] and the encoder's tokens (B, N, C)."""

    positions: Tensor
    images: Tensor
    tokens: Tensor


class DecoderTask:
    """What a Trainer trains in stage 1: `decoder` learns `rae.decoder`.

    The decoder is updated first; then the heads, on what its new weights make of latents without
    noise. λ is that of a micro-batch over all processes: where gradients are accumulated, each
    micro-batch has its own.
    """

    def __init__(
        self,
        rae: RAE,
        decoder: Learner[Decoder],
        objective: DecoderObjective,
        world: World,
        *,
        perceptual: PerceptualLoss | None,
        adversary: Adversary | None,
        precision: Precision = "fp32",
        sample_images: Tensor | None = None,
    ) -> None:
        self.rae, self.decoder, self.objective, self.world = rae, decoder, objective, world
        self.perceptual, self.adversary = perceptual, adversary
        self.precision: Precision = precision
        self.sample_images = sample_images
        self.learners: Mapping[str, Learner[Any]] = {"decoder": decoder}
        if adversary is not None:
            self.learners = {**self.learners, "discriminator": adversary.heads}

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of the decoder, and one of the discriminator from its start on. A term that
        has not started has no figures.

        Raises ValueError for batches without images.
        """
        samples = [self._sample(batch) for batch in batches]
        self.decoder.module.train()
        metrics = means(
            [
                self._decoder_backward(
                    sample, step, len(samples), is_last=index == len(samples) - 1
                )
                for index, sample in enumerate(samples)
            ]
        )
        metrics["lr"] = metrics["loss"].new_tensor(self.decoder.lr)
        metrics["grad_norm"] = self.decoder.update()
        if self.adversary is not None and step >= self.objective.discriminator_start:
            metrics |= self._train_heads(self.adversary, samples)
        return metrics

    @torch.no_grad()
    def _sample(self, batch: Batch) -> Sample:
        if batch.images is None:
            raise ValueError("a decoder learns to make images: latents alone do not do")
        images = batch.images.float() / 255
        latents = batch.latents
        if latents is None:
            with autocast(images.device, self.precision):
                latents = self.rae.encode_raw(images)
        return Sample(batch.positions, images, latents.float().flatten(2).transpose(1, 2))

    def _to_images(self, pixels: Tensor) -> Tensor:
        return pixels.float() * self.rae.image_std + self.rae.image_mean

    def _decoder_backward(
        self, sample: Sample, step: int, num_parts: int, *, is_last: bool
    ) -> dict[str, Tensor]:
        """The losses' gradients end at the images, and one pass takes their sum from there."""
        layer = self.decoder.module.decoder_pred
        tokens = sample.tokens + self.objective.noise(sample.positions, sample.tokens)
        with (
            self.decoder.micro_batch(is_last=is_last),
            autocast(tokens.device, self.precision),
        ):
            with inputs_of(layer) as inputs:
                rebuilt = self._to_images(self.decoder.parallel(tokens))
            metrics, gradient = self._gradient(sample, rebuilt, inputs[0], step)
            rebuilt.backward(gradient / num_parts)
        return metrics

    def _gradient(
        self, sample: Sample, rebuilt: Tensor, inputs: Tensor, step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms, and the gradient of their sum by the images `rebuilt`."""
        objective, images = self.objective, rebuilt.detach().requires_grad_()
        loss = l1 = (images - sample.images).abs().mean()
        terms = {"l1": l1}
        if self.perceptual is not None and step >= objective.perceptual_start:
            perceptual = self.perceptual(2 * images - 1, 2 * sample.images - 1).float()
            loss = loss + objective.perceptual_weight * perceptual
            terms["perceptual"] = perceptual
        (gradient,) = torch.autograd.grad(loss, images)
        if self.adversary is not None and step >= objective.adversarial_start:
            adversarial = generator_loss(self._logits(self.adversary, images, sample.positions))
            (push,) = torch.autograd.grad(adversarial, images)
            weight = self._adaptive_weight(gradient, push, inputs)
            gradient = gradient + objective.adversarial_weight * weight * push
            loss = loss + objective.adversarial_weight * weight * adversarial
            terms |= {"adversarial": adversarial, "adaptive_weight": weight}
        return {name: x.detach() for name, x in {"loss": loss, **terms}.items()}, gradient

    def _logits(self, adversary: Adversary, images: Tensor, positions: Tensor) -> Tensor:
        heads = adversary.heads.module.eval()
        augmented = self.objective.augmented(images, positions, AUGMENT_GENERATED)
        return heads(adversary.features(augmented))[0]

    def _adaptive_weight(self, reconstruction: Tensor, push: Tensor, inputs: Tensor) -> Tensor:
        """λ of the images of all processes, from two gradients by them (B, 3, S, S)."""
        patch_size, std = self.decoder.module.config.patch_size, self.rae.image_std
        gradients = [
            last_layer_gradient(g * std, inputs, patch_size) for g in (reconstruction, push)
        ]
        return adaptive_weight(*self.world.mean(torch.stack(gradients)))

    def _train_heads(self, adversary: Adversary, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Update the heads on `samples`."""
        learner = adversary.heads
        lr = torch.tensor(learner.lr, device=self.world.device)
        rows = []
        self.decoder.module.eval()
        for index, sample in enumerate(samples):
            # Two power iterations an update, however many parts the batch has.
            learner.module.train(index == 0)
            is_last = index == len(samples) - 1
            with (
                learner.micro_batch(is_last=is_last),
                autocast(self.world.device, self.precision),
            ):
                fake, real = learner.parallel(*self._maps(adversary.features, sample))
                loss = discriminator_loss(real, fake)
                (loss / len(samples)).backward()
            accuracy = (real > fake).float().mean()
            rows.append(
                {
                    "discriminator": loss.detach(),
                    "logits_real": real.detach().mean(),
                    "logits_fake": fake.detach().mean(),
                    "accuracy": accuracy,
                }
            )
        norm = learner.update()
        return {**means(rows), "lr_discriminator": lr, "grad_norm_discriminator": norm}

    @torch.no_grad()
    def _maps(self, features: FeatureMaps, sample: Sample) -> tuple[list[Tensor], list[Tensor]]:
        """Features of rebuilt images, of 8 bits as real ones are, and of the images."""
        objective, positions = self.objective, sample.positions
        rebuilt = self._to_images(self.decoder.module(sample.tokens))
        rebuilt = (rebuilt.clamp(0, 1) * 255).round() / 255
        fake = objective.augmented(rebuilt, positions, AUGMENT_FAKE)
        real = objective.augmented(sample.images, positions, AUGMENT_REAL)
        return features(fake), features(real)

    @torch.no_grad()
    def samples(self) -> Tensor | None:
        """The sample images (n, 3, S, S) in [0, 1], then what the averaged weights make of them."""
        if self.sample_images is None:
            return None
        images = self.sample_images.to(self.world.device).float() / 255
        tokens = self.rae.encode_raw(images).flatten(2).transpose(1, 2)
        with self.decoder.averaged() as decoder:
            return torch.cat([images, self._to_images(decoder(tokens)).clamp(0, 1)])


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer is given within, detached."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def means(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
