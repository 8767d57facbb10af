"""A small masked autoencoder (transformers' ViTMAE), pretrained here: the digits' RAE encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.utils.logging import disable_progress_bar

from rae.models.embedders import sincos_2d
from rae.training.batch import Batch
from rae.training.data.samples import Samples
from rae.training.distributed import World
from rae.training.draws import generators
from rae.training.learner import Learner
from rae.training.precision import Precision, autocast, set_matmul_precision
from rae.training.recipe import Recipe
from rae.training.run import run_task
from rae.training.run_settings import RunSettings
from rae.training.trainer import Report

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
MASK = 5  # a purpose of draws


@dataclass(frozen=True, kw_only=True)
class MAERecipe(Recipe):
    """`vit` are the arguments of transformers' ViTMAEConfig."""

    vit: Mapping[str, Any] = field(default_factory=dict)


def build_mae(config: ViTMAEConfig) -> ViTMAEForPreTraining:
    """A masked autoencoder from scratch.

    transformers 5.23 leaves both position tables, the mask token and the class token at zero
    where no weights are loaded: such a model cannot know which patch to predict, and its loss
    stays that of a constant picture.
    """
    model = ViTMAEForPreTraining(config)
    grid = cast(int, config.image_size) // cast(int, config.patch_size)
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data[0, 1:] = sincos_2d(table.shape[-1], grid)
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        torch.nn.init.normal_(token, std=config.initializer_range)
    return model


class MAETask:
    """Reconstruct masked patches of images; which, follows from a sample's position."""

    def __init__(self, learner: Learner[nn.Module], seed: int, precision: Precision) -> None:
        self.learners: Mapping[str, Learner[nn.Module]] = {"mae": learner}
        self.learner, self.seed = learner, seed
        self.precision: Precision = precision

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        learner, losses = self.learner, []
        learner.module.train()
        lr = learner.lr
        for index, batch in enumerate(batches):
            assert batch.images is not None
            pixels = (batch.images.float() / 255 - IMAGE_MEAN[0]) / IMAGE_STD[0]
            device, is_last = pixels.device, index == len(batches) - 1
            with learner.micro_batch(is_last=is_last), autocast(device, self.precision):
                output = learner.parallel(pixel_values=pixels, noise=self.masks(batch, device))
                (output.loss / len(batches)).backward()
            losses.append(output.loss.detach().float())
        loss = torch.stack(losses).mean()
        return {"loss": loss, "grad_norm": learner.update(), "lr": loss.new_tensor(lr)}

    def masks(self, batch: Batch, device: torch.device) -> Tensor:
        """Noise (B, patches): the highest of each sample are masked."""
        mae = cast(ViTMAEForPreTraining, self.learner.module)
        num_patches = mae.decoder.decoder_pos_embed.shape[1] - 1
        each = generators(device, self.seed, batch.positions, MASK)
        return torch.stack([torch.rand(num_patches, generator=g, device=device) for g in each])

    def samples(self) -> Tensor | None:
        return None


def train_mae(
    recipe: MAERecipe, samples: Samples, settings: RunSettings, world: World, report: Report
) -> None:
    """Write OUT/vit: the averaged encoder as transformers has it, without the decoder that masked
    patches were predicted with. Raises what `run_task` raises."""
    set_matmul_precision(settings.precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        mae = build_mae(ViTMAEConfig(**recipe.vit))
    learner: Learner[nn.Module] = recipe.learner(mae, world, len(samples), settings.strategy)
    task = MAETask(learner, recipe.seed, settings.precision)
    run_task(task, recipe, samples, settings, world, report)
    mae.load_state_dict(learner.averages())
    disable_progress_bar()  # of one file that takes no time
    mae.vit.save_pretrained(settings.out / "vit")
