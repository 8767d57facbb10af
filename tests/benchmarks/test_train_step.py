"""The arithmetic around steps of stage 2; the authors' code that is measured is not here."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rae.models.layers import SwiGLU
from rae.training.planning.flops import model_flops
from rae.training.stage2.presets import DIT_PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train_step")


def test_a_padded_mlp_has_the_same_output_and_gradients(script: ModuleType) -> None:
    torch.manual_seed(0)
    plain, padded = SwiGLU(16, 4.0), SwiGLU(16, 4.0)  # 42 hidden units
    padded.load_state_dict(plain.state_dict())
    script.align(padded)
    assert type(padded) is script.AlignedSwiGLU
    x = torch.randn(32, 16)
    outputs = [mlp(x) for mlp in (plain, padded)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), padded.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_figures_are_of_all_rounds(script: ModuleType) -> None:
    rounds = [
        {"seconds": [1.0, 2.0], "cpu_seconds": [0.5], "matmul_flops": 2e12, "memory_gib": 3.0},
        {"seconds": [4.0], "cpu_seconds": [1.5], "matmul_flops": 4e12, "memory_gib": 2.0},
    ]
    rounds = [each | {"loss": 0.1, "draw_seconds": 0.01} for each in rounds]
    args = argparse.Namespace(model="DiTDH-S-256", batch=8, device=torch.device("cpu"))
    figures = script.summarise(rounds, "fp32", args)
    assert figures["ms"] == 2000
    assert figures["cpu_ms"] == 1000
    assert figures["images_per_s"] == 4
    assert figures["memory_gib"] == 3
    assert figures["mfu"] is None
    flops = 4 * model_flops(DIT_PRESETS["DiTDH-S-256"].model).step
    assert figures["gflop_per_s"] == pytest.approx(flops / 1e9, abs=0.1)
    assert figures["of_matmul"] == pytest.approx(flops / 4e12)


def test_their_settings_are_the_published_ones(script: ModuleType) -> None:
    authors = importlib.import_module("authors")
    recipe = DIT_PRESETS["DiTDH-XL-256"]
    section = authors.training_section(recipe)
    assert section["scheduler"]["warmup_epochs"] == 40
    assert section["scheduler"]["decay_end_epoch"] == 800
    assert section["scheduler"]["final_lr"] == 2e-5
    plain = authors.published_arguments(DIT_PRESETS["DiT-XL-256"].model)
    assert (plain["in_channels"], plain["input_size"], plain["hidden_size"]) == (768, 16, 1152)
    assert authors.published_arguments(recipe.model)["hidden_size"] == [1152, 2048]


@pytest.mark.parametrize("name", ["train_step", "train_parity"])
def test_without_the_authors_code_one_line_says_so(
    script: ModuleType, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [name, f"--upstream={tmp_path}"])
    with pytest.raises(SystemExit, match=f"^{name}: {tmp_path} is no clone of bytetriper/RAE"):
        importlib.import_module(name).main()
