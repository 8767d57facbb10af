"""Three steps of stage 2 by the authors' trainer and by ours, on the same weights and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from authors import AuthorsTrainer, make_model, predict_draws
from own_trainer import make_learner, make_rae
from subjects import draw_weights
from torch import Tensor, nn

from rae.models.config import DiTDHConfig
from rae.models.dit import DiT, DiTConfig
from rae.models.dit_dh import DiTDH
from rae.training.batch import Batch
from rae.training.draws import generator
from rae.training.stage2.dit_dh import DiTTask, FlowMatching, StepDraws
from rae.training.stage2.presets import DiTRecipe
from rae.training.stage2.run_dit import objective

NUM_STEPS = 3
FIRST_SEED = 2  # each step of 6 drops some labels and keeps some
TABLES = ("t_embedder.W", "pos_embed")
Config = DiTDHConfig | DiTConfig
Tensors = dict[str, Tensor]

# An epoch is a step, and the rate falls at the third.
SHORT: dict[str, Any] = {"epochs": 3.0, "constant_epochs": 1.0, "ema_decay": 0.9}


class Sample(NamedTuple):
    """The data and the draws of one step."""

    latents: Tensor
    class_labels: Tensor
    draws: StepDraws
    seed: int


@dataclass
class Trace:
    """What three steps gave. `losses` are of the steps, `gradients` of the first."""

    losses: list[float] = field(default_factory=list)
    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    averages: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GivenDraws(FlowMatching):
    """Draws that were made elsewhere, in turn."""

    steps: list[StepDraws]

    def draw(
        self, positions: Tensor, latent_shape: Sequence[int], device: torch.device
    ) -> StepDraws:
        return self.steps.pop(0)


def short_recipe(config: Config, batch_size: int) -> DiTRecipe:
    return DiTRecipe(model=config, batch_size=batch_size, **SHORT)


def draw_weights_of(config: Config) -> Tensors:
    torch.manual_seed(0)
    model = DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)
    draw_weights(model)
    return copies(model.state_dict())


def draw_samples(recipe: DiTRecipe, device: torch.device) -> list[Sample]:
    config, samples = recipe.model, []
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_STEPS):
        rng = generator("cpu", seed)
        latents = torch.randn(recipe.batch_size, *config.latent_shape, generator=rng).to(device)
        labels = torch.randint(config.num_classes, (recipe.batch_size,), generator=rng).to(device)
        samples.append(Sample(latents, labels, predict_draws(recipe, latents, labels, seed), seed))
    return samples


def run_theirs(
    recipe: DiTRecipe, weights: Tensors, samples: list[Sample], *, trains_tables: bool = False
) -> Trace:
    device = samples[0].latents.device
    model = make_model(recipe.model)
    model.load_state_dict(weights)
    trainer = AuthorsTrainer(
        model.to(device), recipe, steps_per_epoch=1, trains_tables=trains_tables
    )
    trace = Trace()
    for sample in samples:
        torch.manual_seed(sample.seed)
        trace.losses.append(trainer.backward(sample.latents, sample.class_labels).item())
        trace.gradients = trace.gradients or copies(gradients(model))
        trainer.update()
    trace.weights, trace.averages = copies(model.state_dict()), copies(trainer.ema.state_dict())
    return trace


def run_ours(recipe: DiTRecipe, weights: Tensors, samples: list[Sample]) -> Trace:
    device = samples[0].latents.device
    learner = make_learner(recipe, weights, device, num_images=recipe.batch_size)
    flow = GivenDraws(**vars(objective(recipe)), steps=[sample.draws for sample in samples])
    rae = make_rae(recipe.model).to(device)
    rae.eps.zero_()  # the latents are normalised already
    task = DiTTask(learner, flow, rae)
    model, first, trace = learner.module, samples[0], Trace()
    flow.loss(model, first.latents, first.class_labels, first.draws).backward()
    trace.gradients = copies(gradients(model))
    model.zero_grad()
    for step, sample in enumerate(samples):
        batch = Batch(
            positions=torch.zeros_like(sample.class_labels),
            class_labels=sample.class_labels,
            latents=sample.latents,
        )
        trace.losses.append(task.train_step([batch], step)["loss"].item())
    assert learner.ema is not None
    trace.weights, trace.averages = copies(model.state_dict()), copies(learner.ema.averages)
    return trace


def gradients(model: nn.Module) -> Tensors:
    """But for the tables, which are not trained here."""
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name not in TABLES
    }


def copies(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}
