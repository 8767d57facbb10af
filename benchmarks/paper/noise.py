"""Claim 3: a decoder that was trained on noised latents decodes imperfect samples better.

    python benchmarks/paper/noise.py [--quick] [--json OUT] [--plot OUT]

Two decoders from the same weights on the same batches, with τ = 0.8 and with none. They decode the
held-out digits' latents, those with noise of σ, and unguided samples: of a DiT^DH that is trained
here, early and later, and of the embedded one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from drawing import label_ends, polish, pretty, save
from lab import (
    Figures,
    Lab,
    Plan,
    encode,
    generator_task,
    open_lab,
    run,
    say,
    trained,
)
from torch import Tensor

from rae.models.config import EncoderConfig
from rae.models.decoder import Decoder
from rae.models.rae import RAE
from rae.training.digits.digits_judge import decode, psnr_db
from rae.training.distributed import World
from rae.training.draws import generator
from rae.training.evaluation.frechet import frechet_distance
from rae.training.stage1.build_decoder import build_decoder_task
from rae.training.stage1.decoder_recipe import DecoderRecipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TAUS = (0.0, 0.8)
SIGMAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2)
SEED, NOISE = 0, 33


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Steps of the decoders and, at most, of the DiT^DH that is judged `early`."""

    copies: int = 8
    steps: int = 600
    batch_size: int = 128
    early: tuple[int, ...] = (150, 300)
    per_class: int = 50


QUICK = Settings(copies=0, steps=4, batch_size=16, early=(2, 3), per_class=3)


def train_decoder(lab: Lab, tau: float, settings: Settings) -> RAE:
    """An RAE with the encoder and the statistics of `lab`, and a decoder of its own."""
    rae = copy.deepcopy(lab.rae)
    torch.manual_seed(SEED)
    rae.decoder = Decoder(rae.decoder.config)
    num_images = len(lab.images)
    epochs = settings.steps / (num_images // settings.batch_size)
    recipe = DecoderRecipe(
        model=rae.decoder.config,
        encoder=EncoderConfig(kind="mae", image_size=32),
        batch_size=settings.batch_size,
        epochs=epochs,
        warmup_epochs=epochs / 20,
        lr=1.5e-3,
        final_lr=3e-5,
        lr_shape="linear",
        clip_norm=1.0,
        ema_decay=0.998,
        ema_rises=True,
        tau=tau,
        perceptual="encoder",
        discriminator="none",
        seed=SEED,
    )
    world = World(0, 1, torch.device("cpu"))
    task = build_decoder_task(recipe, rae, world, num_images, precision="bf16")
    for step, loss in trained(task, lab.batches(settings.batch_size, SEED), settings.steps):
        if step % 250 == 0:
            say(f"decoder, τ {tau:g}, step {step}: loss {loss:.4f}")
    with task.decoder.averaged() as decoder:
        rae.decoder = copy.deepcopy(decoder)
    return rae.eval()


def reconstructions(lab: Lab, rae: RAE) -> list[Figures]:
    """Of the held-out digits, by the noise's σ on the encoder's latents."""
    clean = encode(rae, lab.held_out)
    noise = torch.randn(clean.shape, generator=generator("cpu", SEED, NOISE))
    original = lab.features(lab.held_out)
    rows = []
    for sigma in SIGMAS:
        images = decode(rae, rae.normalise(clean + sigma * noise))
        row = {
            "psnr_db": psnr_db(images, lab.held_out),
            "recognised": lab.recognised(images, lab.held_out_labels),
            "frechet": frechet_distance(lab.features(images), original),
        }
        rows.append({"sigma": sigma, **row})
    return rows


def samples(lab: Lab, settings: Settings) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Names, normalised latents and labels of what generators make."""
    config, shift = lab.checkpoint.config.dit_dh, lab.checkpoint.config.shift
    plan = Plan(steps=max(settings.early), batch_size=settings.batch_size, lr=2e-3, shift=shift)
    task = generator_task(lab.rae, config, plan)
    for step, _ in trained(task, lab.batches(plan.batch_size, SEED + 1), plan.steps):
        if step in settings.early:
            with task.learner.averaged() as model:
                yield f"{step} steps", *lab.samples(model, shift, per_class=settings.per_class)
    final = lab.checkpoint.dit_dh
    yield "embedded", *lab.samples(final, shift, per_class=settings.per_class)


def measure(quick: bool) -> Figures:
    settings = QUICK if quick else Settings()
    lab = open_lab(copies=settings.copies)
    raes = {f"{tau:g}": train_decoder(lab, tau, settings) for tau in TAUS}
    decoded = []
    for name, latents, class_labels in samples(lab, settings):
        for tau, rae in raes.items():
            images = decode(rae, latents)
            row = {
                "recognised": lab.recognised(images, class_labels),
                "frechet": lab.frechet(images),
            }
            decoded.append({"sampler": name, "tau": tau, **row})
            say(f"samples of {name}, τ {tau}: {row}")
    return {
        "claim": "noise",
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "samples": 10 * settings.per_class,
        "real": lab.judged_real(),
        "held_out": {tau: reconstructions(lab, rae) for tau, rae in raes.items()},
        "decoded": decoded,
    }


def draw(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained", dpi=80)
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    draw_noised(left, figures["held_out"], "psnr_db", "PSNR of held-out digits (dB)")
    draw_noised(middle, figures["held_out"], "recognised", "held-out digits recognised")
    rows = figures["decoded"]
    names = list(dict.fromkeys(row["sampler"] for row in rows))
    for place, tau in enumerate(figures["held_out"]):
        found = [row for row in rows if row["tau"] == tau]
        where = [index + 0.4 * place - 0.2 for index in range(len(names))]
        heights = [row["frechet"] for row in found]
        bars = right.bar(where, heights, 0.38, color=f"C{place}", label=f"decoder with τ = {tau}")
        texts = [f"{row['frechet']:.3f}\n{row['recognised']:.1%}" for row in found]
        right.bar_label(bars, texts, fontsize=8)
    right.set_xticks(range(len(names)), names)
    right.set(xlabel=pretty("DiT^DH that made the samples"), ylabel="Fréchet distance (encoder)")
    right.set_title("Samples: distance, and how many are recognised", fontsize=10)
    right.legend(frameon=False, loc="upper right")
    right.margins(y=0.15)
    polish(right)
    save(figure, path)


def draw_noised(axes: Axes, held_out: dict[str, list[Figures]], name: str, label: str) -> None:
    ends = []
    for place, (tau, rows) in enumerate(held_out.items()):
        values = [row[name] for row in rows]
        axes.plot(SIGMAS, values, color=f"C{place}", marker="o")
        ends.append((SIGMAS[-1], values[-1], f"τ = {tau}", f"C{place}"))
    axes.set(xlabel="σ of the noise on the latents", ylabel=label, xlim=(-0.03, SIGMAS[-1]))
    if name == "recognised":
        axes.set_ylim(0, 1.02)
    polish(axes)
    label_ends(axes, ends)


if __name__ == "__main__":
    sys.exit(run(__doc__, measure, draw))
