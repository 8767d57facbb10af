"""A run of stage 2, from a recipe and data to the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rae.models.config import DiTConfig, DiTDHConfig, from_dict
from rae.models.dit import DiT
from rae.models.dit_dh import DiTDH
from rae.models.rae import RAE
from rae.models.sampling import denoise, draw_noise, timesteps
from rae.training.claim import read_claim
from rae.training.data.samples import Samples
from rae.training.distributed import World
from rae.training.learner import Learner
from rae.training.precision import set_matmul_precision
from rae.training.run import compile_blocks, run_task
from rae.training.run_settings import RunSettings
from rae.training.snapshots import SNAPSHOTS, find_snapshot, read_averages
from rae.training.stage2.dit_dh import DiTTask, FlowMatching
from rae.training.stage2.presets import DiTRecipe
from rae.training.trainer import Report

NAME = "dit"
SAMPLES, SAMPLE_STEPS = 32, 50


def build(config: DiTDHConfig | DiTConfig, seed: int) -> DiTDH | DiT:
    """With the published initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)
        model.init_weights()
    return model


def objective(recipe: DiTRecipe) -> FlowMatching:
    model = recipe.model
    return FlowMatching(
        shift=recipe.time_shift,
        null_label=model.null_label,
        class_dropout_prob=model.class_dropout_prob,
        seed=recipe.seed,
    )


@dataclass(frozen=True)
class Sampler:
    """The published sampler without guidance; image i has seed i, classes are spread evenly."""

    recipe: DiTRecipe
    rae: RAE
    device: torch.device

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> Tensor:
        """Images (N, 3, H, W) in [0, 1], on the CPU."""
        config = self.recipe.model
        labels = torch.arange(SAMPLES) * config.num_classes // SAMPLES
        latents = denoise(
            module,
            draw_noise(config.latent_shape, range(SAMPLES)).to(self.device),
            labels.to(self.device),
            timesteps(SAMPLE_STEPS, self.recipe.time_shift).to(self.device),
        )
        return self.rae.decode(latents).clamp(0, 1).cpu()


def train_dit(
    recipe: DiTRecipe,
    samples: Samples,
    rae: RAE,
    settings: RunSettings,
    world: World,
    report: Report,
) -> dict[str, Tensor]:
    """The averaged weights, in the first process; the others have none.

    `rae` encodes where `samples` are images.
    They must fit: see `require_fit`. Raises what `run_task` raises.
    """
    if samples.num_classes < recipe.model.num_classes:
        report.event(
            f"the data have {samples.num_classes:,} classes, the model has "
            f"{recipe.model.num_classes:,}: the others learn nothing. "
            f"--set model.num_classes={samples.num_classes} leaves them out"
        )
    set_matmul_precision(settings.precision)
    rae = rae.to(world.device)
    model = build(recipe.model, recipe.seed)
    learner: Learner[nn.Module] = recipe.learner(model, world, len(samples), settings.strategy)
    if settings.compile:
        compile_blocks(learner.module)
    task = DiTTask(
        learner,
        objective(recipe),
        rae,
        precision=settings.precision,
        draw_samples=Sampler(recipe, rae, world.device),
    )
    epochs = recipe.milestone_epochs
    run_task(task, recipe, samples, settings, world, report, milestone_epochs=epochs)
    return learner.averages()


def require_fit(recipe: DiTRecipe, samples: Samples, rae: RAE) -> None:
    """Raises ValueError."""
    model, decoder = recipe.model, rae.decoder.config
    made = (decoder.latent_channels, decoder.grid, decoder.grid)
    if model.latent_shape != made:
        raise ValueError(f"the RAE's latents are {made}, the model takes {model.latent_shape}")
    if samples.num_classes > model.num_classes:
        raise ValueError(
            f"the data have {samples.num_classes} classes, the model has {model.num_classes}: "
            f"--set model.num_classes={samples.num_classes}"
        )
    if samples.field == "images":
        if rae.encoder is None:
            raise ValueError("images are to be encoded, and the RAE has no encoder")
        if recipe.image_size != decoder.image_size:
            raise ValueError(
                f"image_size {recipe.image_size}; the RAE's images have {decoder.image_size}: "
                f"--set image_size={decoder.image_size}"
            )


def read_recipe(run: Path) -> DiTRecipe:
    """Of a run's folder. Raises ValueError."""
    values = dict(read_claim(run)["recipe"])
    if "class_dropout_prob" not in values.get("model", {}):
        raise ValueError(f"{run} is no run of `rae train dit`")
    kind = DiTDHConfig if "head_hidden_size" in values["model"] else DiTConfig
    values["model"] = from_dict(kind, values["model"])
    for name in ("betas", "milestone_epochs"):
        values[name] = tuple(values[name])
    return from_dict(DiTRecipe, values)


def load_averages(run: Path, step: int | None = None) -> tuple[DiTRecipe, DiTDH | DiT, int]:
    """The recipe, the model with its averaged weights, and the step of a run's snapshot, the last
    or that of `step`. Raises ValueError for a run without it."""
    recipe = read_recipe(run)
    model = build(recipe.model, recipe.seed)
    step, path = find_snapshot(run / SNAPSHOTS, step)
    read_averages(path, NAME, model)
    return recipe, model.eval(), step


def trained(recipe: DiTRecipe, weights: Mapping[str, Tensor]) -> DiTDH | DiT:
    """The model with these weights, in eval mode."""
    model = build(recipe.model, recipe.seed)
    model.load_state_dict(weights)
    return model.eval()
