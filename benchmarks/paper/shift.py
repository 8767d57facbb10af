"""Claim 2: latents of many dimensions need times that are shifted towards noise.

    python benchmarks/paper/shift.py [--quick] [--json OUT] [--plot OUT]

The same DiT^DH on the same batches, with shift 1 (off) and with the digits' own, in training and in
sampling; at the end each is sampled with the other's grid, too. Unguided samples.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from drawing import label_ends, over_seeds, polish, save
from lab import (
    Figures,
    Lab,
    Plan,
    averages,
    generator_task,
    open_lab,
    run,
    say,
    trained,
)

from rae.models.config import DiTDHConfig
from rae.models.sampling import default_shift

PLAN = Plan(steps=800, batch_size=128, lr=2e-3)
SHIFTS = (1.0, 3.0)
SEEDS = (0, 1)
JUDGED_AT = (0.2, 0.4, 0.7, 1.0)
PER_CLASS = 50
CONFIG = DiTDHConfig(
    latent_channels=96,
    latent_size=4,
    hidden_size=64,
    depth=4,
    num_heads=4,
    head_hidden_size=128,
    head_depth=2,
    head_num_heads=4,
    num_classes=10,
)


def train(lab: Lab, plan: Plan, per_class: int) -> Figures:
    """One model, judged on the way; at the end with the grid of every shift."""
    task = generator_task(lab.rae, CONFIG, plan)
    stops = {max(1, round(part * plan.steps)) for part in JUDGED_AT}
    losses, judged, final = [], [], {}
    for step, loss in trained(task, lab.batches(plan.batch_size, plan.seed), plan.steps):
        losses.append(loss)
        if step in stops:
            with task.learner.averaged() as model:
                row = lab.judged(model, plan.shift, per_class=per_class)
            judged.append({"step": step, **row})
            say(f"shift {plan.shift:g}, seed {plan.seed}, step {step}: {row}")
    with task.learner.averaged() as model:
        for shift in SHIFTS:
            final[f"{shift:g}"] = lab.judged(model, shift, per_class=per_class)
    width = max(1, plan.steps // 20)
    return {
        "shift": plan.shift,
        "seed": plan.seed,
        "judged": judged,
        "sampled_with_shift": final,
        "curve": averages(losses, width),
    }


def measure(quick: bool) -> Figures:
    plan = replace(PLAN, steps=5, batch_size=16) if quick else PLAN
    per_class = 3 if quick else PER_CLASS
    lab = open_lab(copies=0 if quick else 8)
    seeds = SEEDS[:1] if quick else SEEDS
    return {
        "claim": "shift",
        "rule_says": default_shift(CONFIG.latent_shape),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "samples": 10 * per_class,
        "real": lab.judged_real(),
        "runs": [
            train(lab, replace(plan, shift=shift, seed=seed), per_class)
            for seed in seeds
            for shift in SHIFTS
        ],
    }


def draw(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=90)
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "recognised"), (right, "frechet")):
        axes.set_xlim(0, figures["steps"])
        ends = []
        for place, shift in enumerate(SHIFTS):
            runs = [row["judged"] for row in figures["runs"] if row["shift"] == shift]
            steps, means, lows, highs = over_seeds(runs, name)
            axes.plot(steps, means, color=f"C{place}", marker="o")
            axes.fill_between(steps, lows, highs, color=f"C{place}", alpha=0.2, linewidth=0)
            ends.append((steps[-1], means[-1], f"shift {shift:g}", f"C{place}"))
        axes.axhline(figures["real"][name], color="gray", linestyle=":", linewidth=1)
        ends.append((figures["steps"], figures["real"][name], "held-out digits", "gray"))
        if name == "frechet":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        axes.set_xlabel(f"training steps of {figures['batch_size']}")
        polish(axes)
        label_ends(axes, ends)
    left.set_ylabel(f"recognised, of {figures['samples']} unguided samples")
    right.set_ylabel("Fréchet distance to the training images (encoder)")
    save(figure, path)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, draw))
