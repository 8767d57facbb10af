"""Stage 2 as the authors train it: their model, loss, optimizer, schedule and average, from a clone
of github bytetriper/RAE, in the order of their `src/train.py`.

The clone needs timm, einops, torchdiffeq, regex and tqdm beside transformers.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rae.models.config import DiTDHConfig
from rae.models.dit import DiTConfig
from rae.training.precision import Precision
from rae.training.stage2.dit_dh import StepDraws
from rae.training.stage2.presets import DiTRecipe


def add_clone(upstream: Path) -> None:
    """Make their modules importable. Raises ImportError where they cannot run."""
    sys.path.insert(0, str(upstream / "src"))
    for name in ("stage2.models.DDT", "stage2.transport", "utils.optim_utils"):
        import_module(name)
    try:
        import_module("omegaconf")
    except ModuleNotFoundError:  # reads YAML files for functions that are not called here
        stub = ModuleType("omegaconf")
        stub.__dict__.update(OmegaConf=None, DictConfig=object)
        sys.modules["omegaconf"] = stub


def require_clone(upstream: Path, script: str) -> None:
    """`add_clone`, or the end of `script` with a line that says why not."""
    try:
        add_clone(upstream)
    except ImportError as error:
        sys.exit(f"{script}: {upstream} is no clone of bytetriper/RAE that can run: {error}")


def published_arguments(config: DiTDHConfig | DiTConfig) -> dict[str, Any]:
    """Of their class's constructor."""
    if isinstance(config, DiTDHConfig):
        return config.to_published()
    arguments = asdict(config)
    arguments["in_channels"] = arguments.pop("latent_channels")
    arguments["input_size"] = arguments.pop("latent_size")
    return arguments


def make_model(config: DiTDHConfig | DiTConfig) -> nn.Module:
    """Theirs, with its own initialisation."""
    if isinstance(config, DiTDHConfig):
        return import_module("stage2.models.DDT").DiTwDDTHead(**published_arguments(config))
    return import_module("stage2.models.lightningDiT").LightningDiT(**published_arguments(config))


def make_transport(recipe: DiTRecipe) -> Any:  # noqa: ANN401
    return import_module("stage2.transport").create_transport(
        time_dist_type="logit-normal_0_1", time_dist_shift=recipe.time_shift
    )


def training_section(recipe: DiTRecipe) -> dict[str, Any]:
    """What their YAML files say under `training`."""
    return {
        "optimizer": {
            "lr": recipe.lr,
            "betas": list(recipe.betas),
            "weight_decay": recipe.weight_decay,
            "eps": recipe.adam_eps,
        },
        "scheduler": {
            "type": "linear",
            "warmup_epochs": recipe.constant_epochs,
            "decay_end_epoch": recipe.epochs,
            "base_lr": recipe.lr,
            "final_lr": recipe.final_lr,
            "warmup_from_zero": False,
        },
    }


class AuthorsTrainer:
    """One process of their trainer after its start.

    `compiles` is their --compile. `trains_tables` is what their `requires_grad_(True)` does: the
    frequencies W and `pos_embed` are trained, too. In DDP where a process group is there.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: DiTRecipe,
        steps_per_epoch: int,
        *,
        precision: Precision = "fp32",
        compiles: bool = False,
        trains_tables: bool = False,
    ) -> None:
        optim = import_module("utils.optim_utils")
        self.update_ema = import_module("utils.train_utils").update_ema
        self.recipe, self.precision = recipe, precision
        if compiles:
            model.forward = torch.compile(model.forward)
        self.ema = deepcopy(model).requires_grad_(False).eval()
        if trains_tables:
            model.requires_grad_(True)
        self.model = model.train()
        self.parallel = self.model
        if torch.distributed.is_initialized():
            device = next(model.parameters()).device
            self.parallel = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=False,
            )
        self.transport = make_transport(recipe)
        section = training_section(recipe)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, _ = optim.build_optimizer(trained, section)
        self.scheduler, _ = optim.build_scheduler(self.optimizer, steps_per_epoch, section)

    def step(self, latents: Tensor, class_labels: Tensor) -> float:
        """Its loss, which they read in each step."""
        loss = self.backward(latents, class_labels)
        self.update()
        return loss.item()

    def backward(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms = self.transport.training_losses(self.parallel, latents, {"y": class_labels})
            loss = terms["loss"].mean()
        loss.backward()
        return loss

    def update(self) -> None:
        if self.recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parallel.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.update_ema(self.ema, self.model, decay=self.recipe.ema_decay)


def predict_draws(recipe: DiTRecipe, latents: Tensor, class_labels: Tensor, seed: int) -> StepDraws:
    """What `AuthorsTrainer.backward` draws after `torch.manual_seed(seed)`."""
    torch.manual_seed(seed)
    t, noise, _ = make_transport(recipe).sample(latents)
    dropout = torch.rand(class_labels.shape[0], device=class_labels.device)
    return StepDraws(t=t, dropped=dropout < recipe.model.class_dropout_prob, noise=noise)
