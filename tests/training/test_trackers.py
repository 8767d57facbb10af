"""TensorBoard's files as it reads them, and what a stand-in for W&B is told."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from rae.training.reports.display import Row
from rae.training.reports.plots import curves
from rae.training.reports.report import RunReport
from rae.training.reports.run_log import read_log
from rae.training.reports.trackers import TensorBoard, Tracker, WeightsAndBiases


def run(tracker: Tracker, start: int, end: int) -> None:
    tracker.start(start)
    for step in range(start + 1, end + 1):
        tracker.show(Row(step=step, num_steps=9, metrics={"loss": 1 / step}, images_per_s=7.0))
    tracker.samples(end, Image.fromarray(np.full((2, 3, 3), end, np.uint8)))
    tracker.close()


def test_tensorboard_reads_what_was_written_and_forgets_what_comes_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(TensorBoard(tmp_path), 0, 3)
    run(TensorBoard(tmp_path), 1, 4)
    found = EventAccumulator(str(tmp_path)).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    assert losses == [(step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)]
    assert found.Scalars("images_per_s")[0].value == 7
    (image,) = found.Images("samples")
    with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
        assert picture.size == (3, 2) and picture.getpixel((0, 0)) == (4, 4, 4)


def test_figures_that_begin_late_are_not_0_before(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    console = Console(file=io.StringIO(), width=200)
    report = RunReport(tmp_path, trackers=[TensorBoard(tmp_path / "board")], console=console)
    report.start(0, 3)
    report.step(1, {"unreadable_images": 0.0}, 1)  # a step that was left out has no loss, either
    report.step(2, {"loss": 3.0}, 1)
    report.step(3, {"loss": 2.0, "accuracy": 0.25}, 1)
    report.close()
    found = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("accuracy")] == [(3, 0.25)]
    assert ["accuracy" in row for row in read_log(tmp_path / "log.jsonl")] == [False, False, True]
    assert curves(tmp_path / "log.jsonl")["accuracy"][0].tolist() == [3]
    assert (tmp_path / "loss.png").stat().st_size > 1000


class StandInRun:
    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self.rows: list[Any] = []
        self.calls: list[Any] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise StandInError("no connection")
        self.rows.append(row)

    def finish(self) -> None:
        self.calls.append("finish")


class StandInError(Exception):
    pass


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[StandInRun]:
    made: list[StandInRun] = []

    def init(**kwargs: Any) -> StandInRun:  # noqa: ANN401
        made.append(StandInRun(kwargs))
        return made[-1]

    wandb = SimpleNamespace(
        init=init,
        Error=StandInError,
        Image=lambda image: np.asarray(image)[0, 0].tolist(),
        Settings=lambda **settings: settings,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return made


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, runs: list[StandInRun]) -> None:
    run(WeightsAndBiases(tmp_path, "rae", {"lr": 2e-4}), 0, 3)
    run(WeightsAndBiases(tmp_path, "rae", {"lr": 2e-4}), 1, 2)
    first, second = runs
    assert first.kwargs["id"] == second.kwargs["id"] and len(first.kwargs["id"]) == 32
    assert first.kwargs["resume"] == "allow" and first.kwargs["project"] == "rae"
    assert first.kwargs["config"] == {"lr": 2e-4}
    assert first.calls == [("*", "step"), "finish"]
    assert second.rows == [
        {"step": 2, "loss": 0.5, "images_per_s": 7.0},
        {"step": 2, "samples": [2, 2, 2]},
    ]


def test_a_lost_connection_ends_no_run(tmp_path: Path, runs: list[StandInRun]) -> None:
    text = io.StringIO()
    tracker = WeightsAndBiases(tmp_path, "rae", {})
    report = RunReport(tmp_path, trackers=[tracker], console=Console(file=text, width=200))
    report.start(0, 5)
    for step in (3, 4, 4, 5):
        report.step(step, {"loss": 1.0}, 1)
    report.samples(4, torch.zeros(1, 3, 2, 2))
    report.close()
    assert text.getvalue().count("W&B: no connection; training goes on without it") == 1
    assert [row["step"] for row in runs[0].rows] == [3, 5]


class Unwritable:
    name = "tracker"

    def start(self, step: int) -> None:
        raise OSError("no folder")

    def show(self, row: Row) -> None:
        raise AssertionError("a tracker that did not start is told of nothing")

    def samples(self, step: int, grid: Image.Image) -> None:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def test_a_tracker_that_cannot_start_is_left_out(tmp_path: Path) -> None:
    text = io.StringIO()
    report = RunReport(tmp_path, trackers=[Unwritable()], console=Console(file=text, width=200))
    report.start(0, 5)
    report.step(1, {"loss": 1.0}, 1)
    report.close()
    assert text.getvalue().count("tracker: no folder; training goes on without it") == 1


@pytest.mark.parametrize(
    ("module", "make", "message"),
    [
        ("torch.utils.tensorboard", lambda folder: TensorBoard(folder), r"rae-server\[report\]"),
        ("wandb", lambda folder: WeightsAndBiases(folder, "rae", {}), "pip install wandb"),
    ],
)
def test_a_library_that_is_not_there_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    make: Callable[[Path], Tracker],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        make(tmp_path)
