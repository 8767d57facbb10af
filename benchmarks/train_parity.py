"""Steps of stage 2 by the authors' code and by ours, on the same weights and the same draws.

    python benchmarks/train_parity.py --upstream DIR [--device cuda] [--json FILE] [--record DIR]

DIR is a clone of github bytetriper/RAE; benchmarks/authors.py says what it needs. Of each model:
relative errors ‖ours − theirs‖ / ‖theirs‖ of the loss, of all gradients together and of the
parameter whose gradient is worst, and after three steps of AdamW with clipping under a falling
rate those of the weights, of their way from the first ones, and of the EMA's. `tables` is how far
the weights come apart where they train W and pos_embed, too, as their trainer does. --record writes
the steps of tiny models for tests/training/test_stage2_parity.py. Exits 1 above a bound.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from authors import AuthorsTrainer, make_model, require_clone
from machine_facts import machine
from safetensors.torch import save_file
from torch import Tensor, nn
from train_traces import (
    SHORT,
    TABLES,
    Config,
    Tensors,
    draw_samples,
    draw_weights_of,
    run_ours,
    run_theirs,
    short_recipe,
)

from rae.models.config import CONFIGS, DiTDHConfig
from rae.models.dit import DiTConfig
from rae.training.precision import set_matmul_precision
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.stage2.losses import logit_normal_quantile
from rae.training.stage2.presets import DIT_PRESETS
from rae.training.stage2.run_dit import build

BOUND = 1e-5

TINY = {
    "latent_channels": 4,
    "latent_size": 2,
    "hidden_size": 8,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "class_dropout_prob": 0.5,
}
RECORDED: dict[str, Config] = {
    "train_ditdh": DiTDHConfig(**TINY, head_hidden_size=12, head_depth=1, head_num_heads=3),
    "train_dit": DiTConfig(**TINY),
}
GOLDEN = DiTDHConfig(
    latent_channels=24,
    latent_size=4,
    hidden_size=48,
    depth=3,
    num_heads=4,
    head_hidden_size=80,
    head_depth=2,
    head_num_heads=4,
    num_classes=10,
)
SUBJECTS: dict[str, Config] = {
    **RECORDED,
    "golden": GOLDEN,
    "golden qk-norm": replace(GOLDEN, use_qknorm=True),
    "golden LayerNorm": replace(GOLDEN, use_rmsnorm=False),
    "golden GELU": replace(GOLDEN, use_swiglu=False),
    "golden no pos_embed": replace(GOLDEN, use_pos_embed=False),
    "DiTDH-S-256": CONFIGS["DiTDH-S-256"],
    "DiT-S-256": DIT_PRESETS["DiT-S-256"].model,
}


def relative_error(ours: Tensors, theirs: Tensors) -> float:
    """Of all of `ours` together. Raises KeyError where one is not theirs."""
    difference = sum(float((ours[n].double() - theirs[n]).square().sum()) for n in ours)
    return (difference / sum(float(theirs[n].double().square().sum()) for n in ours)) ** 0.5


def compare(config: Config, device: torch.device, batch_size: int) -> dict[str, Any]:
    recipe = short_recipe(config, batch_size)
    before, samples = draw_weights_of(config), draw_samples(recipe, device)
    theirs, ours = run_theirs(recipe, before, samples), run_ours(recipe, before, samples)
    assert ours.gradients.keys() == theirs.gradients.keys() == ours.averages.keys()
    each = {n: relative_error({n: g}, theirs.gradients) for n, g in ours.gradients.items()}
    worst = max(each, key=lambda n: each[n])

    def way(after: Tensors) -> Tensors:
        return {n: after[n].double() - before[n].double() for n in ours.averages}

    losses = [torch.tensor(trace.losses, dtype=torch.float64) for trace in (ours, theirs)]
    tables = run_theirs(recipe, before, samples, trains_tables=True).weights
    return {
        "loss": ((losses[0] - losses[1]).abs() / losses[1]).max().item(),
        "gradients": relative_error(ours.gradients, theirs.gradients),
        "worst_gradient": [worst, each[worst]],
        "weights": relative_error({n: ours.weights[n] for n in ours.averages}, theirs.weights),
        "weights_way": relative_error(way(ours.weights), way(theirs.weights)),
        "ema": relative_error(ours.averages, theirs.averages),
        "ema_way": relative_error(way(ours.averages), way(theirs.averages)),
        "tables": {
            "weights_way": relative_error(way(tables), way(theirs.weights)),
            **{
                n.rpartition(".")[2]: (tables[n] - before[n]).abs().max().item()
                for n in TABLES
                if n in before
            },
        },
        "batch": batch_size,
        "gradient_norm": sum(float(g.square().sum()) for g in theirs.gradients.values()) ** 0.5,
    }


def record(name: str, config: Config, folder: Path) -> None:
    """Their steps, to be compared without the clone."""
    recipe = short_recipe(config, 6)
    before, samples = draw_weights_of(config), draw_samples(recipe, torch.device("cpu"))
    trace = run_theirs(recipe, before, samples)
    stacked = {
        "latents": torch.stack([s.latents for s in samples]),
        "class_labels": torch.stack([s.class_labels for s in samples]),
        "t": torch.stack([s.draws.t for s in samples]),
        "dropped": torch.stack([s.draws.dropped for s in samples]),
        "noise": torch.stack([s.draws.noise for s in samples]),
        "losses": torch.tensor(trace.losses, dtype=torch.float64),
    }
    named = {
        "weights": before,
        "gradients": trace.gradients,
        "after": {n: trace.weights[n] for n in trace.gradients},
        "ema": {n: trace.averages[n] for n in trace.gradients},
    }
    tensors = stacked | {f"{kind}.{n}": v for kind, each in named.items() for n, v in each.items()}
    facts = {
        "config": json.dumps(asdict(config)),
        "recipe": json.dumps(SHORT | {"batch_size": recipe.batch_size}),
    }
    save_file(tensors, folder / f"{name}.safetensors", facts)


def compare_schedules(name: str) -> float:
    """The largest difference of the learning rates, over the peak, in a published run."""
    recipe = DIT_PRESETS[name]
    ours = recipe.lr_schedule(IMAGENET_IMAGES)
    per_epoch = IMAGENET_IMAGES // recipe.batch_size
    theirs = AuthorsTrainer(nn.Linear(1, 1), recipe, per_epoch).scheduler.lr_lambdas[0]
    around = (0, 40, 41, 400, 799, 800, 801, 1400)
    steps = [max(0, epoch * per_epoch + shift) for epoch in around for shift in (-1, 0, 1)]
    return max(abs(ours.factor(step) - theirs(step)) for step in steps)


def compare_times(num: int = 100_000) -> dict[str, float]:
    """Of the same uniform numbers, before the shift; theirs are computed in fp32."""
    module = import_module("stage2.transport.transport")
    torch.manual_seed(0)
    theirs = module.truncated_logitnormal_sample((num,), mu=0.0, sigma=1.0, low=0, high=0.999)
    torch.manual_seed(0)
    difference = (logit_normal_quantile(torch.rand(num)) - theirs).abs()
    return {"mean": difference.mean().item(), "max": difference.max().item()}


def compare_init(config: Config) -> dict[str, Any]:
    """Tensors whose mean, standard deviation or share of zeros is another by more than five
    standard errors, and the largest difference of what is not random."""
    ours, theirs = build(config, 1).state_dict(), make_model(config).state_dict()
    fixed = {n for n in theirs if n == "pos_embed" or "freqs_" in n}
    differ: dict[str, Any] = {}
    for name, value in ours.items():
        if name in fixed:
            continue
        one, other = statistics_of(value), statistics_of(theirs[name])
        error = 5 * max(one[1], other[1]) / value.numel() ** 0.5
        limits = (2**0.5 * error, error, 1e-3)
        if any(abs(a - b) > limit for a, b, limit in zip(one, other, limits, strict=True)):
            differ[name] = {"ours": one, "theirs": other}
    assert ours.keys() == theirs.keys()
    tables = max((ours[name] - theirs[name]).abs().max().item() for name in fixed)
    return {"tensors": len(theirs) - len(fixed), "differ": differ, "tables": tables}


def statistics_of(value: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation, share of zeros."""
    value = value.double()
    zeros = (value == 0).double().mean().item()
    return value.mean().item(), value.std(correction=0).item(), zeros


def above_bounds(figures: dict[str, Any]) -> Iterator[str]:
    for name, errors in figures["steps"].items():
        for key in ("loss", "gradients", "weights", "ema"):
            if not errors[key] <= BOUND:
                yield f"{name} {key} {errors[key]:.1e}"
    for name, found in figures["init"].items():
        if found["differ"] or found["tables"] > 1e-6:
            yield f"init of {name}"
    if figures["schedule"] > 1e-12:
        yield f"schedule {figures['schedule']:.1e}"
    if figures["times"]["mean"] > 1e-6:
        yield f"times {figures['times']['mean']:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", type=Path, required=True, help="a clone of bytetriper/RAE")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--record", type=Path, help="a folder for the steps of tiny models")
    args = parser.parse_args()
    require_clone(args.upstream, "train_parity")
    set_matmul_precision("fp32")
    torch.backends.cudnn.allow_tf32 = False  # their embedders are convolutions, ours are linears
    if args.record:
        for name, config in RECORDED.items():
            record(name, config, args.record)
    figures = {
        **machine(args.device),
        "schedule": compare_schedules("DiTDH-S-256"),
        "times": compare_times(),
        "init": {name: compare_init(SUBJECTS[name]) for name in ("DiTDH-S-256", "DiT-S-256")},
        "steps": {
            name: compare(config, args.device, 2 if name.endswith("256") else 8)
            for name, config in SUBJECTS.items()
        },
    }
    text = json.dumps(figures, indent=1) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.write_text(text)
    failed = list(above_bounds(figures))
    sys.stdout.write("".join(f"above its bound: {line}\n" for line in failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
