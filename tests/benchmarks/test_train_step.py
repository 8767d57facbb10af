"""The arithmetic around steps of stage 2; the authors' code that is measured is not here."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rae.models.layers import SwiGLU
from rae.training.batch import Batch
from rae.training.planning.flops import model_flops
from rae.training.stage2.presets import DIT_PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("train_step")


def arguments(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:  # noqa: ANN401
    small = ["--model=digits", "--steps=2", "--warm-up=1", "--rounds=1", "--variant=ours"]
    monkeypatch.setattr(sys, "argv", ["train_step", *small, *flags])
    return script.parse()


def test_a_padded_mlp_has_the_same_output_and_gradients(script: ModuleType) -> None:
    arms = importlib.import_module("train_arms")
    torch.manual_seed(0)
    plain, padded = SwiGLU(16, 4.0), SwiGLU(16, 4.0)  # 42 hidden units
    padded.load_state_dict(plain.state_dict())
    arms.align(padded)
    assert type(padded) is arms.AlignedSwiGLU
    x = torch.randn(32, 16)
    outputs = [mlp(x) for mlp in (plain, padded)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        output.square().sum().backward()
    for one, other in zip(plain.parameters(), padded.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad)


def test_figures_are_of_all_rounds(script: ModuleType) -> None:
    rows = [
        {"seconds": [1.0, 2.0], "cpu_seconds": [0.5], "matmul_flops": 2e12, "memory_gib": 3.0},
        {"seconds": [4.0], "cpu_seconds": [1.5], "matmul_flops": 4e12, "memory_gib": 2.0},
    ]
    rows = [each | {"loss": 0.1, "draw_seconds": 0.01} for each in rows]
    args = argparse.Namespace(model="DiTDH-S-256", device=torch.device("cpu"))
    figures = script.summarise([*rows, {"error": "out of memory"}], "fp32", 8, args)
    assert (figures["ms"], figures["ms_fastest"], figures["cpu_ms"]) == (2000, 1000, 1000)
    assert (figures["images_per_s"], figures["memory_gib"], figures["rounds"]) == (4, 3, 2)
    assert figures["mfu"] is None
    flops = 4 * model_flops(DIT_PRESETS["DiTDH-S-256"].model).step
    assert figures["gflop_per_s"] == pytest.approx(flops / 1e9, abs=0.1)
    assert figures["of_matmul"] == pytest.approx(flops / 4e12)
    assert script.summarise([], "fp32", 8, args) == {"error": "the time was up"}


def test_ratios_are_of_variants_with_figures(script: ModuleType) -> None:
    ours, theirs, failed = {"ms": 4.0, "cpu_ms": 2.0}, {"ms": 6.0, "cpu_ms": 5.0}, {"error": "?"}
    figures = {"ours": ours, "authors": theirs, "authors compiled": failed, "ours compiled": ours}
    found = script.with_ratios(figures)
    assert found.keys() - figures.keys() == {"faster_ms", "faster_cpu_ms"}
    assert (found["faster_ms"], found["faster_cpu_ms"]) == (1.5, 2.5)


def test_the_script_times_our_steps(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the digits' model, in the process of a variant, as people run it."""
    path = tmp_path / "figures.json"
    arguments(script, monkeypatch, "--batch=2", "--batch=4", f"--json={path}")
    assert script.main() == 0
    figures = json.loads(path.read_text())
    assert figures["model"] == "digits" and figures["torch"] == torch.__version__
    for size in (2, 4):
        found = figures["fp32"][str(size)]["ours"]
        assert found["images_per_s"] == pytest.approx(1000 * size / found["ms"], rel=0.02)
        assert 0 < found["ms_fastest"] <= found["ms"] and 0.1 < found["memory_gib"] < 8
        assert 0.5 < found["loss"] < 10


def test_a_batch_that_does_not_fit_ends_no_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(script, monkeypatch, "--batch=4", "--batch=8", "--batch=2")
    our_step = script.our_step

    def limited(recipe: object, batch: Batch, *rest: object) -> object:
        if len(batch) > 4:
            raise torch.OutOfMemoryError
        return our_step(recipe, batch, *rest)

    monkeypatch.setattr(script, "our_step", limited)
    rows = list(script.measure_all(args))
    assert [row["batch"] for row in rows] == [4, 8, 2]
    assert rows[1] == {"batch": 8, "error": "out of memory"}
    assert [len(row["seconds"]) for row in (rows[0], rows[2])] == [2, 2]


@pytest.mark.parametrize(
    ("line", "limit_s", "reason"),
    [
        ("sys.exit(3)", 60, "its process ended with 3"),
        ("__import__('time').sleep(60)", 1, "the time was up"),
    ],
)
def test_what_a_process_has_not_measured_is_said(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    line: str,
    limit_s: float,
    reason: str,
) -> None:
    args = arguments(script, monkeypatch, "--batch=4", "--batch=8")
    child = tmp_path / "child.py"
    child.write_text(f'import sys\nprint(\'{{"batch": 4, "loss": 1.5}}\', flush=True)\n{line}\n')
    monkeypatch.setattr(script, "__file__", str(child))
    rows = script.run_child("ours", "fp32", args, limit_s)
    assert rows == [{"batch": 4, "loss": 1.5}, {"batch": 8, "error": reason}]


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


def test_the_authors_variants_need_their_code(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        arguments(script, monkeypatch, "--variant=authors compiled")
    assert "the authors' variants need --upstream" in capsys.readouterr().err
