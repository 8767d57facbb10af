"""The scripts of the paper's claims: what they compute, at a size that takes seconds."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rae.training.stage2.run_dit import build

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "paper"
Lab = Any
"""A type checker does not find `lab` from here."""
CLAIMS = ("width", "shift", "noise", "head")


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks" / "paper")
        yield {name: importlib.import_module(name) for name in ("lab", "drawing", *CLAIMS)}


@pytest.fixture(scope="module")
def lab(scripts: dict[str, ModuleType]) -> Lab:
    return scripts["lab"].open_lab(copies=0)


@pytest.mark.parametrize("width", [1, 8, 20, 23, 24, 30])
def test_the_floor_is_what_the_best_fit_of_that_rank_leaves(
    scripts: dict[str, ModuleType], width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    tokens = 2 * torch.randn(16, 24, generator=generator, dtype=torch.float64)
    noise = torch.randn(5000, 16, 24, generator=generator, dtype=torch.float64)
    velocities = (noise - tokens).flatten(0, 1)
    _, values, _ = torch.linalg.svd(velocities - velocities.mean(0), full_matrices=False)
    left = values[width:].square().sum().item() / velocities.numel()
    assert scripts["width"].loss_floor(width, tokens) == pytest.approx(left, rel=0.02)


def test_a_narrow_model_stays_above_its_floor(scripts: dict[str, ModuleType], lab: Lab) -> None:
    width = scripts["width"]
    narrow = replace(width.models()["DiT 32×2"], hidden_size=16, depth=1)
    found = width.overfit(lab, narrow, replace(width.PLAN, steps=150))
    assert found["floor"] == pytest.approx(1 - 16 / 96)
    assert found["floor"] < found["loss"] < 1.5
    middles, losses = zip(*found["curve"], strict=True)
    assert list(middles) == [19.0, 56.0, 93.0, 130.0]
    assert list(losses) == sorted(losses, reverse=True)


def test_models_of_a_size_take_as_many_operations(scripts: dict[str, ModuleType]) -> None:
    for models in scripts["head"].SIZES.values():
        counts = [scripts["lab"].forward_mflops(model) for model in models.values()]
        assert max(counts) < 1.03 * min(counts)


def test_noise_on_the_latents_costs_what_is_reported(
    scripts: dict[str, ModuleType], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts["noise"], "SIGMAS", (0.0, 0.3, 0.9))
    rows = scripts["noise"].reconstructions(lab, lab.rae)
    assert rows[0]["sigma"] == 0 and rows[0]["psnr_db"] > 34 and rows[0]["recognised"] > 0.97
    psnrs, distances = ([row[name] for row in rows] for name in ("psnr_db", "frechet"))
    assert psnrs == sorted(psnrs, reverse=True) and distances == sorted(distances)


def test_two_decoders_differ_in_the_noise_alone(scripts: dict[str, ModuleType], lab: Lab) -> None:
    noise, before = scripts["noise"], lab.rae.decoder.decoder_pred.weight.clone()
    settings = replace(noise.QUICK, steps=2)
    first, again, noised = (
        noise.train_decoder(lab, tau, settings).decoder.decoder_pred.weight for tau in (0, 0, 0.8)
    )
    assert torch.equal(first, again) and not torch.equal(first, noised)
    assert torch.equal(lab.rae.decoder.decoder_pred.weight, before)


def test_a_trained_model_is_judged_better_than_a_fresh_one(
    scripts: dict[str, ModuleType],
    lab: Lab,
) -> None:
    trained = lab.checkpoint.dit_dh
    fresh = build(trained.config, 0)
    good, bad = (lab.judged(model, 3.0, per_class=4, num_steps=12) for model in (trained, fresh))
    assert good["recognised"] > 0.8 > bad["recognised"]
    assert good["frechet"] < 0.5 * bad["frechet"]


def test_batches_and_figures_repeat(scripts: dict[str, ModuleType], lab: Lab) -> None:
    once, twice = (lab.batches(8, 3) for _ in range(2))
    pairs = [(next(once), next(twice)) for _ in range(2)]
    assert all(torch.equal(first.latents, second.latents) for first, second in pairs)
    assert not torch.equal(pairs[0][0].latents, pairs[1][0].latents)
    assert pairs[1][0].positions.tolist() == list(range(8, 16))
    runs = [
        [{"step": 5, "x": 1.0}, {"step": 9, "x": 2.0}],
        [{"step": 5, "x": 3.0}, {"step": 9, "x": 0.0}],
    ]
    assert scripts["drawing"].over_seeds(runs, "x") == ([5, 9], [2.0, 1.0], [1.0, 0.0], [3.0, 2.0])


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_recorded_figures_are_plotted(
    scripts: dict[str, ModuleType], claim: str, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    figures = json.loads((RESULTS / f"{claim}.json").read_text())
    assert figures["claim"] == claim
    scripts[claim].draw(figures, tmp_path / "plot.png")
    assert 5_000 < (tmp_path / "plot.png").stat().st_size < 100_000
