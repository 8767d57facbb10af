"""What a start makes ready, what it gives up, and what it remembers of the last one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rae.models.checkpoint import load_checkpoint
from rae.server.engine import Engine
from rae.server.graphs import Buckets, Replayed
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import EngineSettings
from rae.server.step_times import StepTimes
from rae.server.warm_up import remember, remembered, warm_up


def make_runner(folder: Path, **options: object) -> Runner:
    chosen = RunnerOptions(**options)  # type: ignore[arg-type]
    return Runner(load_checkpoint(folder), torch.device("cpu"), chosen)


def let_fit(monkeypatch: pytest.MonkeyPatch, rows: Replayed, largest: int) -> None:
    function = rows._function

    def run(size: int) -> Tensor:
        if size > largest:
            raise torch.OutOfMemoryError
        return function(size)

    monkeypatch.setattr(rows, "_function", run)


def test_every_number_of_rows_is_measured_and_said(tiny_checkpoint: Path) -> None:
    said: list[str] = []
    times = warm_up(make_runner(tiny_checkpoint, max_rows=8), said.append)
    assert list(times.model) == list(times.guide) == [1, 2, 4, 8]
    assert not times.pads
    assert all(0 < seconds < 1 for seconds in times.model.values())
    assert said[:3] == [f"{name}, 1 rows (1 of 1)" for name in ("decoder", "model", "guide")]


def test_buckets_that_do_not_fit_are_given_up(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(tiny_checkpoint, max_rows=16)
    runner.buckets = Buckets.upto(16)
    assert runner.guide is not None
    let_fit(monkeypatch, runner.model.rows, 8)
    let_fit(monkeypatch, runner.guide.rows, 4)
    times = warm_up(runner, lambda _: None)
    assert runner.buckets == Buckets(4, (1, 2, 4))
    assert list(times.model) == list(times.guide) == [1, 2, 4]
    assert times.pads
    runner.buckets = Buckets.upto(16)
    let_fit(monkeypatch, runner.model.rows, 1)
    with pytest.raises(torch.OutOfMemoryError):
        warm_up(runner, lambda _: None)


def test_a_runner_with_buckets_gives_the_same_images(tiny_checkpoint: Path) -> None:
    """Pads, which hold what they held, change nothing."""
    latents = []
    for deterministic in (False, True):
        runner = make_runner(tiny_checkpoint, max_rows=16, slots=5, deterministic=deterministic)
        for slot in range(5):
            spec = ImageSpec(class_label=slot, seed=slot, steps=4 + slot, cfg=1 + slot)
            runner.start(slot, spec)
        for step in range(7):
            runner.step([(slot, step) for slot in range(5) if step < 3 + slot])
        latents.append(runner.latents)
    assert torch.equal(latents[0], latents[1])


def test_times_are_remembered(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("rae.server.warm_up.MEASURED_S", 0.0)
    for largest in (1, 2):
        settings = EngineSettings(device="cpu", max_batch=8)
        engine = Engine(load_checkpoint(tiny_checkpoint), settings, Metrics())
        engine.start()
        engine.submit([ImageSpec(class_label=0, seed=0, steps=9)], "").future.result(60)
        times = engine._scheduler.step_times
        assert max(times.model) == largest, "the first start measures one row"
        times.model[2] = 0.5
        engine.close()


def test_buckets_take_nothing_from_a_start_without_them(tiny_checkpoint: Path) -> None:
    runner = make_runner(tiny_checkpoint, max_rows=8, deterministic=True)
    before = StepTimes({1: 0.001, 8: 0.002}, {1: 0.001})
    times = warm_up(runner, lambda _: None, before)
    assert list(times.model) == list(times.guide) == [8], "one row takes the time of eight"


def test_what_cannot_be_read_or_written_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "times.json"
    assert remembered(path).model == {}
    remember(path, StepTimes({1: 0.25, 4: 0.5}, {1: 0.125}))
    assert (remembered(path).model, remembered(path).guide) == ({1: 0.25, 4: 0.5}, {1: 0.125})
    path.write_text("{")
    assert remembered(path).model == {}
    remember(path / "below a file", StepTimes({1: 0.25}))


def test_smaller_buckets_are_those_that_evaluate_less() -> None:
    buckets = Buckets(24, (1, 2, 4, 8, 24))
    assert [buckets.below(rows) for rows in (24, 9)] == [Buckets(8, (1, 2, 4, 8))] * 2
    assert buckets.below(8) == buckets.below(5) == Buckets(4, (1, 2, 4))
    assert buckets.below(1) is None
    assert Buckets(16, (16,)).below(5) is None, "one size, as for --deterministic"
    assert Buckets(16, None).below(9) == Buckets(4, None)
    assert Buckets(16, None).below(1) is None
