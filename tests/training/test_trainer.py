"""Runs that are cut, resumed, spread over processes and disturbed end as one that is not."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from train_tiny import BATCH, Lines, batches, make_learner, make_task, weights

from rae.training import snapshots
from rae.training.batch import Batch
from rae.training.distributed import World
from rae.training.trainer import (
    MAX_KEPT,
    MAX_SKIPPED,
    DivergedError,
    StoppedError,
    Trainer,
    TrainerConfig,
)

ALONE = World(0, 1, torch.device("cpu"))
STEPS = 6
SCRIPT = Path(__file__).parent / "train_tiny.py"

Run = tuple[Trainer, Lines, dict[str, Tensor]]


def make_trainer(folder: Path, **options: Any) -> tuple[Trainer, Lines]:  # noqa: ANN401
    config = TrainerConfig(num_steps=STEPS, log_every=1, sample_every=2, snapshot_every=100)
    accumulate = options.pop("accumulate", 1)
    make = options.pop("make_batches", None)
    lines = Lines()
    trainer = Trainer(
        make_task(make_learner(ALONE)),
        make or (lambda start: batches(start, ALONE, BATCH // accumulate, accumulate)),
        replace(config, **options),
        ALONE,
        folder,
        lines,
    )
    return trainer, lines


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return weights(trainer.task.learners["dit"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    trainer, lines = make_trainer(tmp_path_factory.mktemp("run"))
    trainer.run()
    losses = [metrics["loss"] for _, metrics in lines.metrics]
    assert len(losses) == STEPS
    assert len(set(losses)) == STEPS
    return weights_of(trainer)


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("cut", range(1, STEPS))
def test_a_run_resumed_at_any_step_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor], cut: int
) -> None:
    first, _ = make_trainer(tmp_path, milestones=frozenset({cut}), num_steps=STEPS - 1)
    first.run()
    for path in (tmp_path / "snapshots").glob("step-*"):
        if int(path.name[5:]) != cut:
            path.rename(path.with_suffix(".partial"))
    second, lines = make_trainer(tmp_path)
    second.run()
    assert lines.lines == [f"start {cut} of {STEPS}"]
    assert same(weights_of(second), undisturbed)
    assert not list(tmp_path.glob("snapshots/*.partial"))


def test_a_run_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    make_trainer(tmp_path)[0].run()
    again, lines = make_trainer(tmp_path)
    again.run()
    assert lines.lines == ["finished before: all 6 steps are done"]


def test_a_mean_is_of_the_steps_that_have_the_figure(tmp_path: Path) -> None:
    trainer, lines = make_trainer(tmp_path, log_every=2)
    train_step = trainer.task.train_step

    def late(batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        later = {"accuracy": torch.tensor(step / 8)} if step in (2, 4, 5) else {}
        return {**train_step(batches, step), **later}

    trainer.task.train_step = late
    trainer.run()
    assert [metrics.get("accuracy") for _, metrics in lines.metrics] == [None, 2 / 8, 9 / 16]
    assert len({tuple(metrics) for _, metrics in lines.metrics[1:]}) == 1
    assert all(metrics["loss"] > 0 for _, metrics in lines.metrics)


def test_an_image_that_cannot_be_read_is_counted_once_over_steps_and_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(start: int) -> Iterator[Sequence[Batch]]:
        for step, (batch,) in enumerate(batches(start, ALONE, BATCH, 1), start):
            yield [replace(batch, unreadable={7: "a: broken", step // 4: "b: broken"})]

    monkeypatch.setattr(World, "gather", lambda _, met: [dict(met), {7: "a: broken"}])
    trainer, lines = make_trainer(tmp_path, make_batches=make, log_every=2)
    trainer.run()
    assert [metrics["unreadable_images"] for _, metrics in lines.metrics] == [2, 2, 3]
    assert lines.lines[1:] == ["skipped a: broken", "skipped b: broken", "skipped b: broken"]


def test_accumulation_is_one_larger_batch(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    trainer, _ = make_trainer(tmp_path, accumulate=4)
    trainer.run()
    assert 0 < distance(weights_of(trainer), undisturbed) < 1e-5


def test_only_the_last_snapshots_and_milestones_stay(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, snapshot_every=1, milestones=frozenset({2}))
    trainer.run()
    assert trainer.snapshots.steps() == [2, 5, 6]


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path) -> None:
    make_trainer(tmp_path)[0].run()
    trainer, _ = make_trainer(tmp_path)
    state = trainer.task.learners["dit"].module.get_submodule("blocks")
    state.append(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="step-000000006 does not fit this run"):
        trainer.run()


def cut(snapshot: Path) -> None:
    os.truncate(next(snapshot.glob("*.distcp")), 1000)


def hollow(snapshot: Path) -> None:
    os.truncate(snapshot / ".metadata", 0)


@pytest.mark.parametrize("damage", [cut, hollow])
def test_a_run_goes_on_from_the_newest_whole_snapshot(
    tmp_path: Path,
    undisturbed: dict[str, Tensor],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_trainer(tmp_path, num_steps=4, snapshot_every=1, keep=3)[0].run()
    folder = tmp_path / "snapshots"
    for step in (3, 4):
        damage(folder / f"step-00000000{step}")
    shutil.copytree(folder / "step-000000003", folder / "step-000000004.damaged")  # of another time
    caplog.clear()
    trainer, lines = make_trainer(tmp_path, keep=1)
    trainer.run()
    for line, step in zip(lines.lines, (4, 3), strict=False):
        name = f"step-00000000{step}"
        assert line.startswith(f"{folder / name} does not fit this run, or is damaged: ")
        assert ":;" not in line  # an error that says nothing
        assert line.endswith(f"; it is {name}.damaged now, and the run goes on from step 2")
    assert lines.lines[2:] == ["start 2 of 6"]
    assert not [r for r in caplog.records if r.exc_info]
    assert not logging.getLogger().disabled
    names = ["step-000000003.damaged", "step-000000004.damaged", "step-000000006"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert same(weights_of(trainer), undisturbed)


def test_a_run_without_a_whole_snapshot_does_not_start_anew(tmp_path: Path) -> None:
    make_trainer(tmp_path, num_steps=2, snapshot_every=1)[0].run()
    folder = tmp_path / "snapshots"
    for snapshot in folder.iterdir():
        cut(snapshot)
    for _ in range(2):
        with pytest.raises(ValueError, match="no snapshot can be read: .*-000000002 .*-000000001 "):
            make_trainer(tmp_path)[0].run()


def test_ctrl_c_while_a_snapshot_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tmp_path, num_steps=2, snapshot_every=1)[0].run()

    def interrupted(*args: Any) -> None:  # noqa: ANN401
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemReader, "read_metadata", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path)[0].run()


def with_nan(steps: range) -> Callable[[int], Iterator[Sequence[Batch]]]:
    def make(start: int) -> Iterator[Sequence[Batch]]:
        for step, (batch,) in enumerate(batches(start, ALONE, BATCH, 1), start):
            if step in steps and batch.latents is not None:
                batch.latents[3, 0, 0, 0] = torch.nan
            yield [batch]

    return make


def test_a_step_that_is_no_number_stops_the_run_and_its_batch_is_kept(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_batches=with_nan(range(2, 3)), snapshot_every=1)
    with pytest.raises(DivergedError, match=r"step 2 is not finite \(loss nan, grad_norm nan"):
        trainer.run()
    path = tmp_path / "nonfinite" / "step-000000002-rank-0.safetensors"
    assert load_file(path)["0.positions"].tolist() == list(range(32, 48))
    with safe_open(path, "pt") as file:
        assert file.metadata()["metrics"].startswith("loss nan")
    assert trainer.snapshots.steps() == [1, 2]
    assert all(value.isfinite().all() for value in weights_of(trainer).values())


def test_a_step_that_is_no_number_can_be_left_out(tmp_path: Path) -> None:
    options: Any = {"make_batches": with_nan(range(2, 3)), "on_nonfinite": "skip"}
    trainer, lines = make_trainer(tmp_path, **options)
    trainer.run()
    assert trainer.task.learners["dit"].num_updates == STEPS - 1
    assert "it was left out" in lines.lines[-1]
    assert [step for step, metrics in lines.metrics if "loss" in metrics] == [1, 2, 4, 5, 6]
    all_bad: Any = {"make_batches": with_nan(range(99)), "on_nonfinite": "skip", "num_steps": 99}
    trainer, lines = make_trainer(tmp_path / "all", **all_bad)
    with pytest.raises(DivergedError, match=f"step {MAX_SKIPPED} "):
        trainer.run()


def test_so_many_batches_are_kept(tmp_path: Path) -> None:
    bad: Any = {"make_batches": with_nan(range(99)), "on_nonfinite": "skip", "num_steps": 99}
    trainer, lines = make_trainer(tmp_path, **bad)
    (tmp_path / "nonfinite").mkdir()
    for number in range(MAX_KEPT - 1):
        (tmp_path / "nonfinite" / f"{number}-rank-0.safetensors").touch()
    with pytest.raises(DivergedError):
        trainer.run()
    assert len(list((tmp_path / "nonfinite").iterdir())) == MAX_KEPT
    assert f"not kept, {tmp_path / 'nonfinite'} has {MAX_KEPT} already" in lines.lines[2]


def test_a_batch_that_cannot_be_kept_hides_no_divergence(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, make_batches=with_nan(range(1)))
    (tmp_path / "nonfinite").touch()
    with pytest.raises(DivergedError, match=r"step 0 is not finite .*not kept, .*File exists"):
        trainer.run()


def test_a_signal_in_the_last_step_is_told_too(tmp_path: Path) -> None:
    def make(start: int) -> Iterator[Sequence[Batch]]:
        for step, found in enumerate(batches(start, ALONE, BATCH, 1), start):
            if step == STEPS - 1:
                signal.raise_signal(signal.SIGINT)
            yield found

    trainer, _ = make_trainer(tmp_path, make_batches=make)
    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        trainer.run()
    assert trainer.snapshots.steps() == [STEPS]


def test_averages_are_read_with_what_is_not_trained(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path)
    module = trainer.task.learners["dit"].module
    fixed = module.state_dict().keys() - dict(module.named_parameters()).keys()
    assert fixed
    for name in fixed:
        module.get_buffer(name).add_(1)  # as if drawn by another torch
    trainer.run()
    other = make_learner(ALONE).module
    snapshots.read_averages(trainer.snapshots.path(STEPS), "dit", other)
    assert same(other.state_dict(), trainer.task.learners["dit"].averages())


def test_a_snapshot_that_cannot_be_written_leaves_the_ones_before(
    tmp_path: Path, undisturbed: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = make_trainer(tmp_path, snapshot_every=2)
    save = snapshots.save
    calls = []

    def full(*args: Any, **options: Any) -> None:  # noqa: ANN401
        calls.append(1)
        save(*args, **options)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "save", full)
    trainer.run()
    assert trainer.snapshots.steps() == [2, 6]
    assert "No space left on device; training goes on" in lines.lines[-1]
    assert same(weights_of(trainer), undisturbed)


def start(folder: Path, *flags: str, ranks: int = 1) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), str(folder), *flags],
            env=os.environ | (shared | {"RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs


def weights_in(folder: Path, strategy: str = "ddp") -> dict[str, Tensor]:
    return load_file(folder / strategy / "weights.safetensors")


def test_two_processes_are_one_with_the_double_batch(
    tmp_path: Path, undisturbed: dict[str, Tensor]
) -> None:
    """And a run goes on alone from where both stopped, or they from where it did."""
    flags = ("--strategies", "ddp", "fsdp", "--micro-batch=4", "--accumulate=2")
    finish(start(tmp_path, "--steps=4", *flags, ranks=2))
    for strategy in ("ddp", "fsdp"):
        assert distance(weights_in(tmp_path, strategy), undisturbed) > 1e-3
        trainer, lines = make_trainer(tmp_path / strategy, num_steps=5)
        trainer.run()
        assert lines.lines == ["start 4 of 5"]
    finish(start(tmp_path, f"--steps={STEPS}", *flags, ranks=2))
    for strategy in ("ddp", "fsdp"):
        assert distance(weights_in(tmp_path, strategy), undisturbed) < 1e-5


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_processes_go_on_from_the_same_snapshot(
    tmp_path: Path, undisturbed: dict[str, Tensor], strategy: str
) -> None:
    """One of them lacks its part of the last."""
    flags = ("--snapshot-every=1", "--strategies", strategy, "--micro-batch=8")
    finish(start(tmp_path, "--steps=4", *flags, ranks=2))
    (tmp_path / strategy / "snapshots" / "step-000000004" / "__1_0.distcp").unlink()
    finish(start(tmp_path, f"--steps={STEPS}", *flags, ranks=2))
    found = sorted(path.name for path in (tmp_path / strategy / "snapshots").iterdir())
    assert found == ["step-000000004.damaged", "step-000000005", "step-000000006"]
    assert distance(weights_in(tmp_path, strategy), undisturbed) < 1e-5


def kill_and_resume(folder: Path, kills: int, steps: int) -> dict[str, Tensor]:
    """What a run ends in that was killed at so many random moments after its first step."""
    draw = random.Random(0)
    flags = (f"--steps={steps}", "--snapshot-every=1", "--sleep=0.05")
    for _ in range(kills):
        (process,) = start(folder, *flags)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(folder, *flags))
    return weights_in(folder)


def test_killed_and_resumed_ends_in_the_same_bits(
    tmp_path: Path, undisturbed: dict[str, Tensor]
) -> None:
    assert same(kill_and_resume(tmp_path, kills=1, steps=STEPS), undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_end_in_the_same_bits(tmp_path: Path) -> None:
    steps = 100
    finish(start(tmp_path / "whole", f"--steps={steps}"))
    killed = kill_and_resume(tmp_path / "killed", kills=20, steps=steps)
    assert same(killed, weights_in(tmp_path / "whole"))


def test_sigterm_saves_and_ends(tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    processes = start(tmp_path, f"--steps={STEPS}", "--sleep=0.3")
    (process,) = processes
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "StoppedError: stopped by SIGTERM, and saved" in output
    (snapshot,) = (tmp_path / "ddp" / "snapshots").iterdir()
    assert 1 < int(snapshot.name[5:]) < STEPS
    finish(start(tmp_path, f"--steps={STEPS}"))
    assert same(weights_in(tmp_path), undisturbed)


def test_a_state_that_is_read_before_the_first_update_changes_nothing(
    undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    trainer, _ = make_trainer(tmp_path)
    trainer.task.learners["dit"].state_dict()
    trainer.run()
    states = trainer.task.learners["dit"].optimizer.state.values()
    assert {int(state["step"]) for state in states} == {STEPS}
    assert same(weights_of(trainer), undisturbed)
