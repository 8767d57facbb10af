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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from authors import AuthorsTrainer, add_clone, make_model, predict_draws
from forward import machine
from safetensors.torch import save_file
from subjects import draw_weights
from torch import Tensor, nn

from rae.models.config import CONFIGS, DecoderConfig, DiTDHConfig
from rae.models.dit import DiT, DiTConfig
from rae.models.dit_dh import DiTDH
from rae.models.rae import RAE
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.dit_dh import DiTTask, FlowMatching, StepDraws
from rae.training.draws import generator
from rae.training.learner import Learner
from rae.training.losses import logit_normal_quantile
from rae.training.presets import DIT_PRESETS, DiTRecipe
from rae.training.recipe import IMAGENET_IMAGES

NUM_STEPS = 3
FIRST_SEED = 2  # each step of 6 drops some labels and keeps some
BOUND = 1e-5
Config = DiTDHConfig | DiTConfig
Tensors = dict[str, Tensor]

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
    config, device = recipe.model, samples[0].latents.device
    model = DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)
    model.load_state_dict(weights)
    learner = Learner[nn.Module](
        model,
        World(0, 1, device),
        recipe.adamw,
        recipe.lr_schedule(recipe.batch_size),
        ema_decay=recipe.ema_decay,
    )
    objective = GivenDraws(
        shift=recipe.time_shift,
        null_label=config.null_label,
        class_dropout_prob=config.class_dropout_prob,
        seed=0,
        steps=[sample.draws for sample in samples],
    )
    task = DiTTask(learner, objective, identity_rae(config).to(device))
    first, trace = samples[0], Trace()
    objective.loss(model, first.latents, first.class_labels, first.draws).backward()
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


def identity_rae(config: Config) -> RAE:
    """Whose latents are normalised already; what it decodes to is not asked."""
    decoder = DecoderConfig(
        latent_channels=config.latent_channels,
        hidden_size=4,
        depth=1,
        num_heads=1,
        intermediate_size=4,
        patch_size=1,
        grid=config.latent_size,
    )
    rae = RAE(decoder, image_mean=(0, 0, 0), image_std=(1, 1, 1), has_mean=False)
    rae.eps.zero_()
    return rae


def gradients(model: nn.Module) -> Tensors:
    """Of what is trained here: their W and pos_embed are left out."""
    tables = ("t_embedder.W", "pos_embed")
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and name not in tables
    }


def copies(tensors: Mapping[str, Tensor]) -> Tensors:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def relative_error(ours: Tensors, theirs: Tensors) -> float:
    """Of all of `ours` together. Raises KeyError where one is not theirs."""
    difference = sum(float((ours[n].double() - theirs[n]).square().sum()) for n in ours)
    return (difference / sum(float(theirs[n].double().square().sum()) for n in ours)) ** 0.5


def moved(after: Tensors, before: Tensors, names: Mapping[str, Tensor]) -> Tensors:
    return {name: after[name].double() - before[name].double() for name in names}


def compare(config: Config, device: torch.device, batch_size: int) -> dict[str, Any]:
    recipe = short_recipe(config, batch_size)
    before, samples = draw_weights_of(config), draw_samples(recipe, device)
    theirs, ours = run_theirs(recipe, before, samples), run_ours(recipe, before, samples)
    assert ours.gradients.keys() == theirs.gradients.keys() == ours.averages.keys()
    each = {n: relative_error({n: g}, theirs.gradients) for n, g in ours.gradients.items()}
    worst = max(each, key=lambda n: each[n])
    trained = ours.averages
    tables = run_theirs(recipe, before, samples, trains_tables=True)
    losses = [torch.tensor(trace.losses, dtype=torch.float64) for trace in (ours, theirs)]
    return {
        "loss": ((losses[0] - losses[1]).abs() / losses[1]).max().item(),
        "gradients": relative_error(ours.gradients, theirs.gradients),
        "worst_gradient": [worst, each[worst]],
        "weights": relative_error({n: ours.weights[n] for n in trained}, theirs.weights),
        "weights_way": relative_error(
            moved(ours.weights, before, trained), moved(theirs.weights, before, trained)
        ),
        "ema": relative_error(ours.averages, theirs.averages),
        "ema_way": relative_error(
            moved(ours.averages, before, trained), moved(theirs.averages, before, trained)
        ),
        "tables": {
            "weights_way": relative_error(
                moved(tables.weights, before, trained), moved(theirs.weights, before, trained)
            ),
            **{
                n.rpartition(".")[2]: (tables.weights[n] - before[n]).abs().max().item()
                for n in ("t_embedder.W", "pos_embed")
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
    torch.manual_seed(1)
    ours = DiTDH(config) if isinstance(config, DiTDHConfig) else DiT(config)
    ours.init_weights()
    theirs = make_model(config).state_dict()
    fixed = {n for n in theirs if n == "pos_embed" or "freqs_" in n}
    differ: dict[str, Any] = {}
    for name, value in ours.state_dict().items():
        if name in fixed:
            continue
        one, other = statistics_of(value), statistics_of(theirs[name])
        error = 5 * max(one[1], other[1]) / value.numel() ** 0.5
        limits = (2**0.5 * error, error, 1e-3)
        if any(abs(a - b) > limit for a, b, limit in zip(one, other, limits, strict=True)):
            differ[name] = {"ours": one, "theirs": other}
    assert ours.state_dict().keys() == theirs.keys()
    state = ours.state_dict()
    tables = max((state[name] - theirs[name]).abs().max().item() for name in fixed)
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
    try:
        add_clone(args.upstream)
    except ImportError as error:
        sys.exit(
            f"train_parity: {args.upstream} is no clone of bytetriper/RAE that can run: {error}"
        )
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
