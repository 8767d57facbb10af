"""Claim 4: DiT^DH, a narrow backbone with a wide head, beats a plain DiT of as many operations.

    python benchmarks/paper/head.py [--quick] [--json OUT] [--plot OUT]

The same batches, noise, steps and optimiser for all; operations are those of one image's forward.
The loss is that of the held-out digits, with times and noise that are the same for all.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from drawing import label_ends, over_seeds, polish, save
from lab import (
    Figures,
    Lab,
    Plan,
    averages,
    encode,
    forward_mflops,
    generator_task,
    open_lab,
    run,
    say,
    trained,
)
from torch import Tensor

from rae.models.config import DiTDHConfig
from rae.models.dit import DiTConfig
from rae.training.stage2.dit_dh import DiTTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAN = Plan(steps=600, batch_size=64, lr=2e-3)
SEEDS = (0, 1)
JUDGED_AT = (0.4, 0.7, 1.0)
PER_CLASS, GRID_POINTS = 50, 16
DRAWS, TEST_START = 4, 10**9

Config = DiTConfig | DiTDHConfig


def plain(hidden_size: int, depth: int) -> DiTConfig:
    return DiTConfig(
        latent_channels=96,
        latent_size=4,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=4,
        num_classes=10,
    )


def with_head(hidden_size: int, depth: int, head_hidden_size: int, head_depth: int) -> DiTDHConfig:
    return DiTDHConfig(
        latent_channels=96,
        latent_size=4,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=4,
        head_hidden_size=head_hidden_size,
        head_depth=head_depth,
        head_num_heads=4,
        num_classes=10,
    )


SIZES: dict[str, dict[str, Config]] = {
    "small": {
        "DiT^DH 64×4 + 128×2": with_head(64, 4, 128, 2),
        "DiT 128×4": plain(128, 4),
    },
    "large": {
        "DiT^DH 128×4 + 192×2": with_head(128, 4, 192, 2),
        "DiT 192×5": plain(192, 5),
    },
}
"""Within 3 % of the operations of the size's DiT^DH."""


@torch.no_grad()
def held_out_loss(task: DiTTask, latents: Tensor, class_labels: Tensor) -> float:
    """Of the averaged weights, on held-out latents (N, C, h, w), normalised; no label dropped."""
    objective = replace(task.objective, class_dropout_prob=0.0, seed=0)
    losses = []
    with task.learner.averaged() as model:
        for index in range(DRAWS):
            positions = TEST_START + index * len(latents) + torch.arange(len(latents))
            draws = objective.draw(positions, latents.shape[1:], latents.device)
            losses.append(objective.loss(model, latents, class_labels, draws).item())
    return mean(losses)


def train(lab: Lab, config: Config, plan: Plan, per_class: int) -> Figures:
    """One model, judged on the way."""
    task = generator_task(lab.rae, config, plan)
    held_out = lab.rae.normalise(encode(lab.rae, lab.held_out))
    stops = {max(1, round(part * plan.steps)) for part in JUDGED_AT}
    losses, judged = [], []
    for step, loss in trained(task, lab.batches(plan.batch_size, plan.seed), plan.steps):
        losses.append(loss)
        if step in stops:
            row = {"step": step, "loss": held_out_loss(task, held_out, lab.held_out_labels)}
            with task.learner.averaged() as model:
                row |= lab.judged(model, plan.shift, per_class=per_class, num_steps=GRID_POINTS)
            judged.append(row)
    return {
        "seed": plan.seed,
        "mflops": forward_mflops(config),
        "parameters": sum(p.numel() for p in task.learner.module.parameters()),
        "judged": judged,
        "curve": averages(losses, max(1, plan.steps // 20)),
    }


def measure(quick: bool) -> Figures:
    plan = replace(PLAN, steps=4, batch_size=16) if quick else PLAN
    per_class, seeds = (3, SEEDS[:1]) if quick else (PER_CLASS, SEEDS)
    lab = open_lab(copies=0 if quick else 8)
    runs: list[Figures] = []
    for seed, (size, models) in product(seeds, SIZES.items()):
        for name, config in models.items():
            found = train(lab, config, replace(plan, seed=seed), per_class)
            runs.append({"size": size, "model": name, **found})
            say(f"{name}, seed {seed}: {found['judged'][-1]}")
    return {
        "claim": "head",
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "lr": plan.lr,
        "samples": 10 * per_class,
        "real": lab.judged_real(),
        "runs": runs,
    }


def draw(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained", dpi=75)
    grid = figure.subplots(len(SIZES), 3)
    names = {
        "loss": "velocity loss, held-out digits",
        "recognised": "samples recognised",
        "frechet": "Fréchet distance (encoder)",
    }
    for row, size in zip(grid, SIZES, strict=True):
        for axes, (name, label) in zip(row, names.items(), strict=True):
            draw_size(axes, figures, size, name)
            axes.set(xlabel=f"training steps of {figures['batch_size']}", ylabel=label)
    save(figure, path)


def draw_size(axes: Axes, figures: Figures, size: str, name: str) -> None:
    """A line per model, with the range over the seeds."""
    ends = []
    for place, model in enumerate(SIZES[size]):
        runs = [run for run in figures["runs"] if run["model"] == model]
        steps, means, lows, highs = over_seeds([run["judged"] for run in runs], name)
        axes.plot(steps, means, color=f"C{place}", marker="o")
        axes.fill_between(steps, lows, highs, color=f"C{place}", alpha=0.2, linewidth=0)
        ends.append((steps[-1], means[-1], model, f"C{place}"))
    if name == "frechet":
        axes.set_yscale("log")
    polish(axes)
    flops = next(run["mflops"] for run in figures["runs"] if run["size"] == size)
    axes.set_title(f"about {flops:.0f} MFLOP an image", fontsize=10)
    label_ends(axes, ends)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, draw))
