"""The loop around every stage: batches in, snapshots and reports out, whatever happens."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rae.training.batch import Batch
from rae.training.data.unreadable import Unreadable
from rae.training.distributed import World
from rae.training.learner import Learner
from rae.training.snapshots import SNAPSHOTS, Snapshots
from rae.training.wording import counted

STOPS = (signal.SIGTERM, signal.SIGINT)
MAX_SKIPPED = 10
"""Steps in a row without a finite gradient: more are no accident."""
MAX_KEPT = 10
"""Batches without a finite gradient that a folder keeps: the disk is for snapshots."""

MakeBatches = Callable[[int], Iterator[Sequence[Batch]]]
"""From a step on: the micro-batches of each step, of this process."""


class Task(Protocol):
    """What is trained. `train_step` says means over this process's samples, 0-d tensors, of what
    the step has done, which is the same in all processes."""

    @property
    def learners(self) -> Mapping[str, Learner[Any]]: ...

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor]: ...

    def samples(self) -> Tensor | None: ...


class Report(Protocol):
    """Who is told, in the first process."""

    def start(self, step: int, num_steps: int) -> None: ...

    def step(self, step: int, metrics: Mapping[str, float], num_images: int) -> None: ...

    def samples(self, step: int, images: Tensor) -> None: ...

    def event(self, text: str) -> None: ...

    def close(self) -> None: ...


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class StoppedError(RuntimeError):
    """A signal has ended the run; its state is saved, and the same command goes on."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name}, and saved")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Numbers of steps. `on_nonfinite`: stop, or leave the step out; the batch is saved."""

    num_steps: int
    log_every: int = 100
    sample_every: int = 2500
    snapshot_every: int = 5000
    keep: int = 2
    milestones: frozenset[int] = frozenset()
    on_nonfinite: Literal["stop", "skip"] = "stop"


class Trainer:
    """Runs `task` in `folder`, from its last whole snapshot on.

    SIGTERM and Ctrl-C save and end the run; a second Ctrl-C ends it at once.
    """

    def __init__(
        self,
        task: Task,
        make_batches: MakeBatches,
        config: TrainerConfig,
        world: World,
        folder: Path,
        report: Report,
    ) -> None:
        self.task, self.make_batches, self.config = task, make_batches, config
        self.world, self.folder, self.report = world, folder, report
        self.snapshots = Snapshots(
            folder / SNAPSHOTS,
            task.learners,
            world,
            keep=config.keep,
            milestones=config.milestones,
        )
        self.window: list[dict[str, Tensor]] = []
        self.num_images = self.skipped_in_a_row = 0
        self.met: dict[int, str] = {}
        self.unreadable = Unreadable(report.event if world.is_first else lambda text: None)
        self.stop_signal: int | None = None

    def run(self) -> None:
        """To the last step. Raises StoppedError after a signal, DivergedError, ValueError where
        there are snapshots and none can be read, and OSError where the last cannot be written."""
        start, num_steps = self.snapshots.load_last(self.report.event), self.config.num_steps
        if start >= num_steps:
            self.report.event(f"finished before: all {counted(num_steps, 'step')} are done")
            return
        self.report.start(start, num_steps)
        with self._signals():
            batches = self.make_batches(start)
            for step in range(start, num_steps):
                stop = self._step(step, next(batches))
                if stop is not None:
                    raise StoppedError(stop)

    def _step(self, step: int, batches: Sequence[Batch]) -> signal.Signals | None:
        """One step and what is due after it; the signal, of any process, that ends the run."""
        batches = [batch.to(self.world.device) for batch in batches]
        metrics = self.task.train_step(batches, step)
        nonfinite = not torch.stack(list(metrics.values())).isfinite().all()
        asked = [self.stop_signal == number for number in STOPS]
        flags = torch.tensor([nonfinite, *asked], dtype=torch.float32, device=self.world.device)
        nonfinite, *asked = self.world.sum(flags).bool().tolist()
        stop = next((STOPS[index] for index, is_asked in enumerate(asked) if is_asked), None)
        if nonfinite:
            self._nonfinite(step, batches, metrics)
        else:
            self.skipped_in_a_row = 0
            self.window.append(metrics)
        self.num_images += sum(map(len, batches)) * self.world.size
        for batch in batches:
            self.met.update(batch.unreadable)
        done = step + 1
        ends = stop is not None or done == self.config.num_steps
        if done % self.config.log_every == 0 or ends:
            self._log(done)
        if done % self.config.sample_every == 0 or done == self.config.num_steps:
            images = self.task.samples()
            if images is not None and self.world.is_first:
                self.report.samples(done, images)
        if ends or done % self.config.snapshot_every == 0 or done in self.config.milestones:
            self._save(done, must=ends)
        return stop

    def _log(self, done: int) -> None:
        """Means since the last time, over all processes and the steps that have the figure; and
        how many images could not be read since the processes began, each counted once however
        many epochs and processes have met it. A resumed run counts anew."""
        metrics: dict[str, float] = {}
        if self.window:
            names = list(dict.fromkeys(name for row in self.window for name in row))
            rows = [[row[name] for row in self.window if name in row] for name in names]
            means = torch.stack([torch.stack(values).double().mean() for values in rows])
            metrics = dict(zip(names, self.world.mean(means).tolist(), strict=True))
        for met in self.world.gather(self.met):
            self.unreadable.add(met)
        metrics["unreadable_images"] = len(self.unreadable)
        if self.world.is_first:
            self.report.step(done, metrics, self.num_images)
        self.window.clear()
        self.met.clear()
        self.num_images = 0

    def _nonfinite(
        self, step: int, batches: Sequence[Batch], metrics: Mapping[str, Tensor]
    ) -> None:
        """A learner takes no step without a finite gradient: its weights are as they were."""
        values = ", ".join(f"{name} {value.item():g}" for name, value in metrics.items())
        self.skipped_in_a_row += 1
        kept = self._keep(step, batches, values)
        text = f"step {step} is not finite ({values}); its batch: {kept}"
        if self.config.on_nonfinite == "stop" or self.skipped_in_a_row > MAX_SKIPPED:
            raise DivergedError(text)
        if self.world.is_first:
            self.report.event(f"{text}; it was left out")

    def _keep(self, step: int, batches: Sequence[Batch], values: str) -> str:
        """Where it lies now, or why it does not."""
        folder = self.folder / "nonfinite"
        path = folder / f"step-{step:09}-rank-{self.world.rank}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if len(list(folder.glob(f"*-rank-{self.world.rank}.*"))) >= MAX_KEPT:
                return f"not kept, {folder} has {MAX_KEPT} already"
            save_file(tensors_of(batches), path, {"metrics": values})
        except (OSError, SafetensorError) as error:
            return f"not kept, {error}"
        return str(path)

    def _save(self, done: int, *, must: bool) -> None:
        try:
            self.snapshots.save(done)
        except OSError as error:
            if must:
                raise
            if self.world.is_first:
                self.report.event(f"{error}; training goes on, the snapshots before stay")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_signal = number

        before = {number: signal.signal(number, stop) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def tensors_of(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Of micro-batches, by number and name."""
    return {
        f"{index}.{name}": getattr(batch, name).cpu()
        for index, batch in enumerate(batches)
        for name in ("positions", "class_labels", "images", "latents")
        if getattr(batch, name) is not None
    }
