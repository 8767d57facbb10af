"""What the comparison with the authors' trainer makes of two traces; their code is not here."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train_parity")


def test_the_weights_are_those_of_the_recordings(script: ModuleType) -> None:
    for name, config in script.RECORDED.items():
        recorded = load_file(ROOT / "tests" / "golden" / f"{name}.safetensors")
        for key, value in script.draw_weights_of(config).items():
            assert torch.equal(value, recorded[f"weights.{key}"]), key


def test_an_error_is_relative_and_of_all_tensors(script: ModuleType) -> None:
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "c": torch.ones(1)}
    ours = {"a": torch.tensor([3.0, 0.3]), "b": torch.tensor([4.4])}
    assert script.relative_error(ours, theirs) == pytest.approx(0.1)


def test_what_is_above_its_bound_is_named(script: ModuleType) -> None:
    good = dict.fromkeys(("loss", "gradients", "weights", "ema"), 1e-7)
    figures = {
        "steps": {"a": good, "b": good | {"gradients": 2e-5, "ema": float("nan")}},
        "init": {"a": {"differ": {}, "tables": 0.0}, "b": {"differ": {"w": 1}, "tables": 0.0}},
        "schedule": 1e-6,
        "times": {"mean": 1e-8},
    }
    assert list(script.above_bounds(figures)) == [
        "b gradients 2.0e-05",
        "b ema nan",
        "init of b",
        "schedule 1.0e-06",
    ]
