"""The benchmark of whole images: its arithmetic, its arms, and a run on the tiny checkpoint."""

from __future__ import annotations

import csv
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from rae.models.config import CONFIGS
from rae.models.sampling import timesteps

if TYPE_CHECKING:
    from benchmarks.arms import Task

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def task(method: str, steps: int = 5, interval: tuple[float, float] = (0.0, 1.0)) -> Task:
    arms = importlib.import_module("arms")
    return arms.Task(steps=steps, method=method, cfg=1.5, interval=interval)


def test_rows_are_counted_where_the_guidance_is() -> None:
    needed_rows = importlib.import_module("throughput").needed_rows
    middle = timesteps(5, 1.5)[1:3].tolist()  # two of the four evaluations
    inside = (middle[1], middle[0])
    assert needed_rows(task("none", interval=inside), 1.5) == (1.0, 0.0)
    assert needed_rows(task("cfg"), 1.5) == (2.0, 0.0)
    assert needed_rows(task("cfg", interval=inside), 1.5) == (1.5, 0.0)
    assert needed_rows(task("autoguidance", interval=inside), 1.5) == (1.0, 0.5)


def test_a_forward_has_the_published_number_of_flops() -> None:
    count = importlib.import_module("forward").count
    assert round(count(CONFIGS["DiTDH-XL-256"], 1)[1]) == 323


@pytest.mark.parametrize("method", ["none", "cfg", "autoguidance"])
def test_every_arm_makes_the_same_images(method: str, tiny_checkpoint: Path) -> None:
    arms = importlib.import_module("arms")
    asked = task(method)
    ours = [
        arms.Ours(tiny_checkpoint, CPU, asked, 3, precision="fp32", published_rows=published)
        for published in (False, True)
    ]
    plain = arms.Plain(tiny_checkpoint, CPU, torch.float32)
    needed, published, reference = (list(arm.sample(asked, 3))[-1] for arm in (*ours, plain))
    assert np.std(reference) > 10
    np.testing.assert_array_equal(needed, published)
    assert np.abs(np.int16(needed) - np.int16(reference)).max() <= 1


class Clocked:
    """By its own clock it takes 1 s for noise, 2 for each evaluation, 4 to decode; it has no room
    for a batch of `too_large`."""

    def __init__(self, clock: list[float], too_large: int = 99) -> None:
        self.clock, self.too_large = clock, too_large

    def sample(self, task: Task, batch: int) -> Iterator[list[np.ndarray] | None]:
        if batch >= self.too_large:
            raise MemoryError(f"no room for {batch}")
        self.clock[0] += 1
        yield None
        self.clock[0] += 2 * (task.steps - 1)
        yield None
        self.clock[0] += 4
        yield [np.zeros(1)] * batch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    for name in ("arms", "lanes"):
        times = SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0])
        monkeypatch.setattr(importlib.import_module(name), "time", times)
    return now


def test_what_fails_costs_nobody_else_its_figures(clock: list[float]) -> None:
    lanes = importlib.import_module("lanes")
    good = lanes.Lane("good", lambda: Clocked(clock), CPU)
    small = lanes.Lane("small", lambda: Clocked(clock, too_large=8), CPU)
    broken = lanes.Lane("broken", lambda: Clocked(clock, 1 // 0), CPU)
    asked = task("none", steps=11)
    for batch, turns, error in ((4, 2, None), (8, 0, "MemoryError: no room for 8"), (4, 2, None)):
        lanes.in_turns([(lane, batch) for lane in (good, small, broken)], asked, 2, math.inf)
        assert (len(good.times), len(small.times), len(broken.times)) == (2, turns, 0)
        assert small.figures(asked, batch).get("error") == error
        assert broken.figures(asked, batch)["error"].startswith("ZeroDivisionError")
    figures = {"images_per_s": 4 / 25, "ms_per_step": 2000.0, "decode_ms": 4000.0}
    assert good.figures(asked, 4) == {"arm": "good", "batch": 4, "turns": 2} | figures


def test_no_turn_begins_that_would_end_too_late(clock: list[float]) -> None:
    lanes = importlib.import_module("lanes")
    asked = task("none", steps=11)  # a turn takes 25 s, the two short ones before 18
    lane = lanes.Lane("slow", lambda: Clocked(clock), CPU)
    lanes.in_turns([(lane, 1)], asked, 9, deadline=18 + 60)
    assert len(lane.times) == 2
    clock[0] = 0
    lanes.in_turns([(lane, 1)], asked, 9, deadline=18 + 20)
    assert lane.times == []
    assert lane.figures(asked, 1)["error"] == "TimeoutError: takes 25 s, and 20 s are left"


def test_a_run_on_the_tiny_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "throughput.py", "--model", tiny_checkpoint]
    command += ["--device", "cpu", "--steps", "3", "--turns", "1", "--batch", "2", "--batch", "1"]
    command += ["--part", "sweep", "--part", "ablation", "--part", "deterministic"]
    command += ["--out", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert result.returncode == 0, f"{result.stderr} {found}"
    with (tmp_path / "throughput.csv").open() as file:
        rows = list(csv.DictReader(file))
    swept = [(row["arm"], row["batch"]) for row in rows if row["part"] == "sweep"]
    assert swept == [("ours", "2"), ("ours", "1")]
    assert [row["batch"] for row in rows if row["part"] == "ablation"] == list("111222")
    assert [row["batch"] for row in rows if row["part"] == "deterministic"] == list("2211")
    for row in rows:
        assert 0 < float(row["of_the_peak"]) < 1 and not row["error"]
        assert float(row["ms_per_step"]) > 0 and row["method"] == "autoguidance"
        assert 0 < float(row["images_per_s"]) < 500 * int(row["batch"]) / float(row["ms_per_step"])


def test_graphs_of_others_keep_their_cublas_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_trees

    cleared: list[bool] = []
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: cleared.append(True), raising=False)
    with cudagraph_trees.clear_cublas_manager():
        assert cleared
    # What is set back after the test.
    monkeypatch.setattr(cudagraph_trees, "clear_cublass_cache", cudagraph_trees.clear_cublass_cache)
    importlib.import_module("arms").keep_workspaces()
    cleared.clear()
    with cudagraph_trees.clear_cublas_manager():
        pass
    assert not cleared
