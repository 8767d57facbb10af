"""What a run leaves behind and shows, when it runs, is cut, resumes, and has no disk left."""

from __future__ import annotations

import io
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from rae.training.distributed import World
from rae.training.planning import gpus
from rae.training.reports.display import Row
from rae.training.reports.report import RunReport, Silent, Speed
from rae.training.reports.run_log import RunLog, read_log
from rae.training.trainer import Report


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=200), text


def train(
    report: RunReport,
    clock: Clock,
    start: int,
    end: int,
    *,
    num_steps: int = 40,
    seconds: float = 2.0,
) -> None:
    """A row every 10 steps, of 100 images each, `seconds` a step."""
    report.start(start, num_steps)
    for step in range(start + 10, end + 1, 10):
        clock.now += 10 * seconds
        report.step(step, {"loss": 1 / step, "lr": 2e-4, "unreadable_images": 0.0}, 1000)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """The log without speeds, which no two runs share."""
    rows = read_log(folder / "log.jsonl")
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "mfu")} for row in rows]


def test_a_cut_runs_log_is_an_undisturbed_ones(tmp_path: Path) -> None:
    clock, (console, _) = Clock(), plain()
    train(RunReport(tmp_path / "a", console=console, clock=clock), clock, 0, 40)
    train(RunReport(tmp_path / "b", console=console, clock=clock), clock, 0, 30)
    log = tmp_path / "b" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-7])  # killed within a line
    train(RunReport(tmp_path / "b", console=console, clock=clock), clock, 10, 40)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert [row["step"] for row in read_log(log)] == [10, 20, 30, 40]
    events = (tmp_path / "b" / "events.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in events] == [
        "started: 40 steps",
        "resumed after step 10 of 40",
    ]


def test_what_is_not_whole_is_not_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(log) == [{"step": 1, "loss": 2.0}]
    run_log = RunLog(log)
    run_log.start(5)
    run_log.append({"step": 6, "loss": float("nan")})
    assert log.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 6, "loss": null}\n'


def test_images_a_second_mfu_and_time_left(tmp_path: Path) -> None:
    clock, (console, text) = Clock(), plain()
    report = RunReport(tmp_path, flops_per_image=2e9, peak_flops=1e12, console=console, clock=clock)
    report.start(100, 1000)
    clock.now += 500  # compiling
    for step in (110, 120, 130):
        clock.now += 20
        report.step(step, {"loss": 0.5, "lr": 1e-4, "unreadable_images": 3.0}, 1000)
    first, _, last = read_log(tmp_path / "log.jsonl")
    assert "images_per_s" not in first and "mfu" not in first
    assert last["images_per_s"] == pytest.approx(50)
    assert last["mfu"] == pytest.approx(50 * 2e9 / 1e12)
    # 870 steps of 2 seconds.
    expected = (
        "step 130/1,000  loss 0.5000  lr 1.00e-04  50.0 images/s  MFU 10.0%  3 unreadable  "
        "29 min 00 s left"
    )
    assert text.getvalue().splitlines()[-1] == expected


def test_speed_is_of_the_last_two_minutes() -> None:
    clock = Clock()
    speed = Speed(clock)
    assert speed.add(0, 100) is None
    found = None
    for step in range(1, 101):  # 100 s of 1 step a second
        clock.now += 1
        found = speed.add(step, 10)
    assert found == pytest.approx((1, 10))
    for step in range(101, 141):  # 400 s of 10 seconds a step
        clock.now += 10
        found = speed.add(step, 10)
    assert found == pytest.approx((0.1, 1))


def test_an_unknown_device_has_no_mfu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = World(0, 2, torch.device("cpu"))
    assert gpus.world_peak_flops(cpu, "bf16") is None
    cuda = World(0, 4, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert gpus.world_peak_flops(cuda, "bf16") == 4 * 989.4e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert gpus.world_peak_flops(cuda, "bf16") is None


def test_a_terminal_has_a_bar_that_knows_where_it_resumed(tmp_path: Path) -> None:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, width=140, force_terminal=True, color_system=None)
    report = RunReport(tmp_path, console=console, clock=clock)
    train(report, clock, 20, 40, num_steps=60)
    report.event("a snapshot")
    report.close()
    shown = text.getvalue()
    assert "20/60" in shown
    assert "40/60" in shown and "50.0 images/s" in shown
    assert "40 s left" in shown and "a snapshot" in shown
    assert "step 40/60" not in shown  # that is the line of no terminal


def test_the_loss_that_is_shown_is_the_one_that_is_logged(tmp_path: Path) -> None:
    console, text = plain()
    report = RunReport(tmp_path, console=console, clock=Clock())
    report.start(0, 2)
    for step, loss in ((1, 3.0), (2, 1.0)):
        report.step(step, {"loss": loss}, 1)
    assert text.getvalue().splitlines()[1:] == ["step 1/2  loss 3.0000", "step 2/2  loss 1.0000"]
    assert [row["loss"] for row in read_log(tmp_path / "log.jsonl")] == [3.0, 1.0]


def test_rows_have_speeds_where_they_are_known() -> None:
    row = Row(step=3, num_steps=9, metrics={"loss": 1.0}, images_per_s=5.0)
    assert row.values() == {"step": 3, "loss": 1.0, "images_per_s": 5.0}


def test_samples_and_the_losses_curve_are_written(tmp_path: Path) -> None:
    clock, (console, _) = Clock(), plain()
    report = RunReport(tmp_path, console=console, clock=clock)
    train(report, clock, 0, 40)
    report.samples(40, torch.ones(3, 3, 4, 6) * torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1))
    with Image.open(tmp_path / "samples" / "0000040.png") as grid:
        assert grid.size == (12, 8)
        corners = [grid.getpixel(at) for at in ((0, 0), (6, 0), (0, 4), (6, 4))]
    assert corners == [(0, 0, 0), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.width > 1000


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_once_and_no_row_stays_half(tmp_path: Path) -> None:
    clock, (console, text) = Clock(), plain()
    report = RunReport(tmp_path, console=console, clock=clock)
    report.start(0, 100)
    with full_disk(130):
        for step in range(1, 11):
            clock.now += 1
            report.step(step, {"loss": 1.0, "lr": 0.5}, 10)
        report.samples(10, torch.rand(4, 3, 32, 32))
        report.samples(10, torch.rand(4, 3, 32, 32))
    report.step(11, {"loss": 1.0, "lr": 0.5}, 10)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 11]
    said = [line for line in text.getvalue().splitlines() if "training goes on" in line]
    assert len(said) == 3 and [line.split(":")[0] for line in said] == [
        "log.jsonl",
        "samples",
        "loss.png",
    ]


def test_without_matplotlib_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    clock, (console, text) = Clock(), plain()
    report = RunReport(tmp_path, console=console, clock=clock)
    train(report, clock, 0, 40)
    report.samples(40, torch.rand(1, 3, 2, 2))
    report.close()
    assert text.getvalue().count("pip install 'rae-server[report]'") == 1
    assert not (tmp_path / "loss.png").exists()


def test_all_processes_but_the_first_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reports: list[Report] = [Silent(), RunReport(tmp_path / "first")]
    for report in reports:
        report.start(0, 10)
        report.step(10, {"loss": 1.0}, 10)
        report.samples(10, torch.zeros(1, 3, 2, 2))
        report.event("done")
        report.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]
    expected = ["started: 10 steps", "step 10/10  loss 1.0000", "done"]
    assert capfd.readouterr().out.splitlines() == expected
