"""Claim 1: a DiT that is narrower than its tokens cannot overfit one image; a wide head can.

    python benchmarks/paper/width.py [--quick] [--json OUT] [--plot OUT]

One digit, 16 tokens of 96 channels; noise and times are new in every step. The velocity of a token
is a point of the subspace that the last linear spans, whose dimension is the width at most: so the
loss is at least the mean over the channels of the trailing eigenvalues of Cov(noise − latents)
(arXiv 2510.11690, theorem 1).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from drawing import label_ends, polish, pretty, save
from lab import (
    Figures,
    Lab,
    Plan,
    averages,
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
from rae.training.batch import Batch
from rae.training.stage2.dit_dh import DiTTask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAN = Plan(steps=800, batch_size=32, lr=2e-3, class_dropout_prob=0, precision="fp32")
CHANNELS = 96
WIDTHS = (32, 64, 80, 96, 128, 192)
DEPTH, DEEP = 2, 6
NARROW = 64
HEADS = (128, 192)
SAMPLE = 0
FRESH_DRAWS, FRESH_START = 1024, 10**9
SMOOTHED = 50

Config = DiTConfig | DiTDHConfig


def loss_floor(width: int, tokens: Tensor) -> float:
    """Of a velocity of rank `width` and a bias, for one image's tokens (N, C), normalised."""
    covariance = torch.cov(tokens.double().T, correction=0)
    covariance += torch.eye(len(covariance), dtype=torch.float64)  # of the noise
    eigenvalues = torch.linalg.eigvalsh(covariance)  # ascending
    return eigenvalues[: max(0, len(eigenvalues) - width)].sum().item() / len(eigenvalues)


def last_width(config: Config) -> int:
    return config.head_hidden_size if isinstance(config, DiTDHConfig) else config.hidden_size


def models() -> dict[str, Config]:
    plain = DiTConfig(
        latent_channels=CHANNELS,
        latent_size=4,
        hidden_size=96,
        depth=DEPTH,
        num_heads=4,
        num_classes=10,
    )
    found: dict[str, Config] = {
        f"DiT {width}×{DEPTH}": replace(plain, hidden_size=width) for width in WIDTHS
    }
    found[f"DiT {NARROW}×{DEEP}"] = replace(plain, hidden_size=NARROW, depth=DEEP)
    for head in HEADS:
        found[f"DiT^DH {NARROW}×{DEPTH} + {head}×1"] = DiTDHConfig(
            latent_channels=CHANNELS,
            latent_size=4,
            hidden_size=NARROW,
            depth=DEPTH,
            num_heads=4,
            head_hidden_size=head,
            head_depth=1,
            head_num_heads=4,
            num_classes=10,
        )
    return found


def batch(lab: Lab, size: int, start: int) -> Batch:
    return Batch(
        positions=torch.arange(start, start + size),
        class_labels=lab.class_labels[SAMPLE].expand(size),
        latents=lab.latents[SAMPLE].expand(size, -1, -1, -1),
    )


@torch.no_grad()
def fresh_loss(task: DiTTask, data: Batch) -> float:
    """Of the averaged weights, on noise and times that no step has seen."""
    latents = task.latents(data)
    draws = task.objective.draw(data.positions, latents.shape[1:], latents.device)
    with task.learner.averaged() as model:
        return task.objective.loss(model, latents, data.class_labels, draws).item()


def overfit(lab: Lab, config: Config, plan: Plan) -> Figures:
    task = generator_task(lab.rae, config, plan)
    data = (batch(lab, plan.batch_size, start) for start in count(0, plan.batch_size))
    losses = [loss for _, loss in trained(task, data, plan.steps)]
    tokens = lab.rae.normalise(lab.latents[SAMPLE]).flatten(1).T
    return {
        "width": last_width(config),
        "mflops": forward_mflops(config),
        "floor": loss_floor(last_width(config), tokens),
        "loss": fresh_loss(task, batch(lab, FRESH_DRAWS, FRESH_START)),
        "curve": averages(losses, min(SMOOTHED, max(1, plan.steps // 4))),
    }


def measure(quick: bool) -> Figures:
    plan = replace(PLAN, steps=8) if quick else PLAN
    lab = open_lab(copies=0)
    arms: dict[str, Figures] = {}
    for name, config in models().items():
        arms[name] = overfit(lab, config, plan)
        say(f"{name}: loss {arms[name]['loss']:.4f}, floor {arms[name]['floor']:.4f}")
    return {"claim": "width", "steps": plan.steps, "batch_size": plan.batch_size, "arms": arms}


def draw(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained", dpi=90)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.set(yscale="log", xlim=(0, figures["steps"]))
    left.set(xlabel=f"training steps of {figures['batch_size']}", ylabel="velocity loss")
    left.set_title("Plain DiT, overfitting one digit (dotted: the floor of its width)", fontsize=10)
    ends = []
    for place, width in enumerate(WIDTHS):
        arm, colour = figures["arms"][f"DiT {width}×{DEPTH}"], f"C{place}"
        steps, losses = zip(*arm["curve"], strict=True)
        left.plot(steps, losses, color=colour)
        if arm["floor"]:
            left.axhline(arm["floor"], color=colour, linestyle=":", linewidth=1)
        ends.append((steps[-1], losses[-1], f"width {width}", colour))
    polish(left)
    label_ends(left, ends)
    draw_ends(right, figures["arms"])
    polish(right)
    save(figure, path)


def draw_ends(axes: Axes, arms: dict[str, Figures]) -> None:
    """The loss at the end over the width of the last layer, and the floor as a line."""
    axes.plot([0, CHANNELS, 200], [1, 0, 0], color="gray", linewidth=1)
    axes.annotate("floor: 1 − width/96", (48, 0.5), (8, 4), textcoords="offset points")
    kinds = {
        "o": (f"plain DiT, depth {DEPTH}", [f"DiT {width}×{DEPTH}" for width in WIDTHS]),
        "s": (f"plain DiT, depth {DEEP}", [f"DiT {NARROW}×{DEEP}"]),
        "*": (
            f"DiT^DH, backbone {NARROW}×{DEPTH}",
            [f"DiT^DH {NARROW}×{DEPTH} + {head}×1" for head in HEADS],
        ),
    }
    for marker, (label, names) in kinds.items():
        points = [(arms[name]["width"], arms[name]["loss"]) for name in names]
        axes.plot(
            *zip(*points, strict=True), marker, label=pretty(label), markersize=9, fillstyle="none"
        )
    axes.set(xlabel="width of the last layers", ylabel="velocity loss at the end", xlim=(0, 200))
    axes.set_ylim(bottom=0)
    axes.set_title(f"The tokens have {CHANNELS} channels", fontsize=10)
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, draw))
