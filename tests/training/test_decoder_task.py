"""A step of stage 1 against the same written out, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEModel

from rae.models.config import DecoderConfig, EncoderConfig
from rae.models.encoder import Encoder
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.draws import generator
from rae.training.stage1.build_decoder import build_decoder_task
from rae.training.stage1.decoder import (
    AUGMENT_FAKE,
    AUGMENT_GENERATED,
    AUGMENT_REAL,
    NOISE,
    DecoderTask,
)
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.stage1.diff_augment import diff_augment
from rae.training.stage1.features import EncoderFeatures

ALONE = World(0, 1, torch.device("cpu"))
SEED = 5
STD = (0.2, 0.3, 0.4)
CONFIG = DecoderConfig(
    latent_channels=16,
    hidden_size=16,
    depth=1,
    num_heads=2,
    intermediate_size=32,
    patch_size=4,
    grid=4,
)
RECIPE = DecoderRecipe(
    model=CONFIG,
    encoder=EncoderConfig(kind="mae", image_size=16),
    batch_size=4,
    epochs=4,
    perceptual="encoder",
    discriminator="encoder",
    discriminator_start_epoch=0,
    adversarial_start_epoch=0,
    seed=SEED,
)
NUM_IMAGES = 8  # two steps an epoch


def tiny_rae() -> RAE:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        mask_ratio=0.0,
    )
    vit = ViTMAEModel(config)
    rae = RAE(CONFIG, image_mean=(0.5, 0.4, 0.3), image_std=STD)
    for parameter in (*vit.parameters(), *rae.decoder.parameters()):
        nn.init.normal_(parameter, std=0.2)
    rae.encoder = Encoder(RECIPE.encoder, vit)
    return rae


def make_task(**changes: Any) -> DecoderTask:  # noqa: ANN401
    rae = tiny_rae()
    return build_decoder_task(replace(RECIPE, **changes), rae, ALONE, NUM_IMAGES)


def batch(*positions: int) -> Batch:
    images = [
        torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(position))
        for position in positions
    ]
    return Batch(
        positions=torch.tensor(positions),
        class_labels=torch.zeros(len(positions), dtype=torch.int64),
        images=torch.stack(images).to(torch.uint8),
    )


def gradients(task: DecoderTask, name: str) -> dict[str, Tensor]:
    """Of the first update, out of Adam's moments."""
    learner = task.learners[name]
    state = learner.optimizer.state
    return {
        key: state[parameter]["exp_avg"] / 0.1
        for key, parameter in learner.module.named_parameters()
        if parameter in state
    }


class Reference:
    """Stage 1 in plain torch, on copies of a task's networks."""

    def __init__(self, task: DecoderTask, images: Batch) -> None:
        assert task.adversary is not None and images.images is not None
        self.rae = copy.deepcopy(task.rae)
        self.decoder = self.rae.decoder
        self.heads = copy.deepcopy(task.adversary.heads.module)
        self.features = EncoderFeatures(self.rae)
        self.positions = images.positions.tolist()
        self.real = images.images / 255
        assert self.rae.encoder is not None
        mean, self.std = self.rae.image_mean, self.rae.image_std
        self.tokens = self.rae.encoder((self.real - mean) / self.std)

    def rebuild(self, tokens: Tensor) -> Tensor:
        return self.decoder(tokens) * self.std + self.rae.image_mean

    def augmented(self, images: Tensor, purpose: int) -> Tensor:
        draws = [torch.rand(5, generator=self.draw(p, purpose)) for p in self.positions]
        return diff_augment(images * 2 - 1, torch.stack(draws))

    def draw(self, position: int, purpose: int) -> torch.Generator:
        return generator("cpu", SEED, position, purpose)

    def noisy_tokens(self) -> Tensor:
        rows = []
        for position, tokens in zip(self.positions, self.tokens, strict=True):
            g = self.draw(position, NOISE)
            sigma = 0.8 * torch.rand((), generator=g)
            rows.append(tokens + sigma * torch.randn(tokens.shape, generator=g))
        return torch.stack(rows)

    def decoder_step(self) -> dict[str, float]:
        """Leaves the gradients in the decoder."""
        rebuilt = self.rebuild(self.noisy_tokens())
        l1 = (rebuilt - self.real).abs().mean()
        ours, theirs = (self.features(2 * x - 1) for x in (rebuilt, self.real))
        distances = [
            (F.layer_norm(a.mT, (16,)) - F.layer_norm(b.mT, (16,))).square().mean()
            for a, b in zip(ours, theirs, strict=True)
        ]
        perceptual = sum(distances, torch.zeros(())) / len(distances)
        self.heads.eval()
        logits = self.heads(self.features(self.augmented(rebuilt, AUGMENT_GENERATED)))[0]
        adversarial = -logits.mean()
        reconstruction, weight = l1 + perceptual, self.decoder.decoder_pred.weight
        norms = [
            torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()
            for loss in (reconstruction, adversarial)
        ]
        adaptive = (norms[0] / (norms[1] + 1e-6)).detach()
        loss = reconstruction + 0.75 * adaptive * adversarial
        loss.backward()
        terms = {"loss": loss, "l1": l1, "perceptual": perceptual, "adversarial": adversarial}
        return {key: x.item() for key, x in {**terms, "adaptive_weight": adaptive}.items()}

    def heads_step(self, decoder: Mapping[str, Tensor]) -> dict[str, float]:
        """With the decoder's new weights; leaves the gradients in the heads."""
        self.decoder.load_state_dict(decoder)
        self.heads.train()
        with torch.no_grad():
            rebuilt = self.rebuild(self.tokens).clamp(0, 1).mul(255).round() / 255
            fake_maps = self.features(self.augmented(rebuilt, AUGMENT_FAKE))
            real_maps = self.features(self.augmented(self.real, AUGMENT_REAL))
        fake, real = self.heads(fake_maps)[0], self.heads(real_maps)[0]
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.heads.zero_grad()
        loss.backward()
        return {
            "discriminator": loss.item(),
            "logits_real": real.mean().item(),
            "logits_fake": fake.mean().item(),
            "accuracy": (real > fake).float().mean().item(),
        }


def assert_same_gradients(ours: Mapping[str, Tensor], module: nn.Module) -> None:
    expected = {k: p.grad for k, p in module.named_parameters() if p.requires_grad}
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert value is not None and value.abs().max() > 0 or "bias" in name
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_is_the_recipe_written_out() -> None:
    task, images = make_task(), batch(7, 100, 3)
    reference = Reference(task, images)
    metrics = task.train_step([images], step=0)
    expected = reference.decoder_step()
    assert_same_gradients(gradients(task, "decoder"), reference.decoder)
    expected |= reference.heads_step(task.rae.decoder.state_dict())
    assert_same_gradients(gradients(task, "discriminator"), reference.heads)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert metrics["lr"].item() == metrics["lr_discriminator"].item() == pytest.approx(1e-4)


def test_frozen_parts_stay_and_have_no_gradient() -> None:
    task = make_task()
    encoder = task.rae.encoder
    assert encoder is not None
    before = copy.deepcopy(encoder.state_dict())
    table = task.rae.decoder.decoder_pos_embed.clone()
    for step in range(2):
        task.train_step([batch(step)], step)
    assert all(value.equal(before[key]) for key, value in encoder.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert task.rae.decoder.decoder_pos_embed.equal(table)
    assert "decoder_pos_embed" not in dict(task.rae.decoder.named_parameters())


def test_terms_start_at_their_epochs_and_the_heads_count_their_own_updates() -> None:
    task = make_task(
        perceptual_start_epoch=0.5, discriminator_start_epoch=1, adversarial_start_epoch=1.5
    )
    assert task.adversary is not None
    names = ("perceptual", "discriminator", "adversarial")
    rows = [task.train_step([batch(step)], step) for step in range(4)]
    counts = [[name in row for name in names] for row in rows]
    assert counts == [[False] * 3, [True, False, False], [True, True, False], [True] * 3]
    assert list(rows[0]) == ["loss", "l1", "lr", "grad_norm"]
    assert rows[0]["loss"] == rows[0]["l1"]
    assert all(row[name] != 0 for row in rows for name in names if name in row)
    assert task.adversary.heads.num_updates == 2 and task.decoder.num_updates == 4
    # Two steps of warm-up, then a cosine over the six left to a tenth.
    assert [row["lr"].item() for row in rows] == pytest.approx(
        [1e-4, 2e-4, 2e-4, 2e-4 * (0.1 + 0.9 * 0.9330127)]
    )
    assert [row["lr_discriminator"].item() for row in rows[2:]] == pytest.approx([1e-4, 2e-4])


@pytest.mark.parametrize("discriminator", ["none", "encoder"])
def test_micro_batches_add_up(discriminator: str) -> None:
    """Exactly so without the adversarial term, whose weight is each micro-batch's own."""
    changes: dict[str, Any] = {"discriminator": discriminator, "adversarial_start_epoch": 1}
    whole, parts = make_task(**changes), make_task(**changes)
    one = whole.train_step([batch(1, 2, 3, 4)], 0)
    two = parts.train_step([batch(1, 2), batch(3, 4)], 0)
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-4), name
    for key, value in gradients(whole, "decoder").items():
        torch.testing.assert_close(gradients(parts, "decoder")[key], value, rtol=1e-4, atol=1e-6)


def test_latents_computed_before_give_the_same_step() -> None:
    plain, prepared = make_task(), make_task()
    images = batch(1, 2)
    assert images.images is not None
    latents = prepared.rae.encode_raw(images.images / 255)
    one = plain.train_step([images], 0)
    two = prepared.train_step([replace(images, latents=latents)], 0)
    for name, value in one.items():
        assert two[name].item() == pytest.approx(value.item(), rel=1e-5), name
    with pytest.raises(ValueError, match="latents alone"):
        prepared.train_step([replace(images, images=None, latents=latents)], 1)


def test_a_run_learns_and_the_samples_are_of_the_averaged_weights() -> None:
    images = batch(*range(4))
    rae = tiny_rae()
    recipe = replace(RECIPE, lr=5e-3, tau=0.1, ema_decay=0.9, discriminator="none", epochs=100)
    task = build_decoder_task(recipe, rae, ALONE, NUM_IMAGES, sample_images=images.images)
    losses = [task.train_step([images], step)["loss"].item() for step in range(60)]
    assert losses[-1] < 0.8 * losses[0]
    samples = task.samples()
    assert samples is not None and samples.shape == (8, 3, 16, 16)
    assert images.images is not None
    assert samples[:4].equal(images.images / 255)
    online = {name: p.detach().clone() for name, p in rae.decoder.named_parameters()}
    assert task.decoder.ema is not None
    rae.decoder.load_state_dict(task.decoder.ema.averages, strict=False)
    tokens = rae.encode_raw(samples[:4]).flatten(2).transpose(1, 2)
    expected = rae.decoder(tokens) * rae.image_std + rae.image_mean
    torch.testing.assert_close(samples[4:], expected.clamp(0, 1))
    assert any(not p.equal(online[name]) for name, p in rae.decoder.named_parameters())


def test_noise_is_uniform_in_strength_and_belongs_to_a_sample() -> None:
    objective = make_task().objective
    noise = objective.noise(torch.arange(2000), torch.zeros(2000, 16, 16))
    sigma = noise.flatten(1).std(1)
    assert sigma.mean().item() == pytest.approx(0.4, abs=0.015)
    assert sigma.quantile(0.25).item() == pytest.approx(0.2, abs=0.02)
    assert sigma.max().item() < 0.9
    alone = objective.noise(torch.tensor([17]), torch.zeros(1, 16, 16))
    assert alone[0].equal(noise[17])
