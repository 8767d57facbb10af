"""The state of a run on disk, from which it goes on as if it had never stopped.

torch.distributed.checkpoint writes it: each process its part, and any number of processes reads
it. A snapshot has its name only when it is whole.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rae.training.distributed import World
from rae.training.learner import Learner

SNAPSHOTS = "snapshots"
"""Their folder, in a run's."""
NAME = re.compile(r"step-(\d{9})")
PARTIAL, DAMAGED = ".partial", ".damaged"
MAX_REASON = 300  # characters: torch gives advice on pickles


class Snapshots:
    """Of `learners`, in `folder`; the last `keep` and those of the steps `milestones` stay."""

    def __init__(
        self,
        folder: Path,
        learners: Mapping[str, Learner[Any]],
        world: World,
        *,
        keep: int = 2,
        milestones: frozenset[int] = frozenset(),
    ) -> None:
        self.folder, self.learners, self.world = folder, learners, world
        self.keep, self.milestones = keep, milestones

    def steps(self) -> list[int]:
        """Of whole snapshots, rising."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09}"

    def save(self, step: int) -> None:
        """After `step` steps. Raises OSError in every process where it cannot be written: the
        snapshots before stay."""
        partial = self.path(step).with_suffix(PARTIAL)
        self._together(step, self._clear, only_first=True)

        def write() -> None:
            with quietly():
                save(self._state(step), checkpoint_id=partial, no_dist=self.world.size == 1)

        self._together(step, write)
        self._together(step, lambda: self._finish(step, partial), only_first=True)

    def _together(self, step: int, work: Callable[[], None], *, only_first: bool = False) -> None:
        """What fails in one process fails in all: none waits for another in vain."""
        problem: BaseException | None = None
        if self.world.is_first or not only_first:
            try:
                work()
            except (OSError, CheckpointException) as error:
                problem = error
        if self.world.any(problem is not None):
            if self.world.is_first:
                shutil.rmtree(self.path(step).with_suffix(PARTIAL), ignore_errors=True)
            reason = problem or "another process could not"
            raise OSError(f"{self.folder}: no snapshot of step {step} could be written: {reason}")

    def _finish(self, step: int, partial: Path) -> None:
        partial.replace(self.path(step))
        sync(self.folder)
        for old in [s for s in self.steps() if s not in self.milestones][: -self.keep]:
            shutil.rmtree(self.path(old))

    def load_last(self, tell: Callable[[str], None]) -> int:
        """The step of the newest whole snapshot, the same in all processes; 0 where there is none.

        Newer ones that cannot be read are told, and set aside under another name. Raises ValueError
        that names all where none can be.
        """
        problems: dict[int, str] = {}
        # The first process's: on a shared disk others may see the last one later.
        for step in reversed(self.world.gather(self.steps())[0]):
            problem = self._problem_of(step)
            if problem is not None:
                problems[step] = problem
                continue
            for damaged, text in problems.items() if self.world.is_first else ():
                aside = self._set_aside(damaged)
                tell(f"{text}; it is {aside.name} now, and the run goes on from step {step:,}")
            return step
        if problems:
            raise ValueError(f"no snapshot can be read: {'; '.join(problems.values())}")
        return 0

    def _problem_of(self, step: int) -> str | None:
        """What keeps a process from loading it, said in all; None where it is loaded."""
        problem = None
        try:
            self.load(step)
        except ValueError as error:
            problem = str(error)
        return next(filter(None, self.world.gather(problem)), None)

    def _set_aside(self, step: int) -> Path:
        """Its name is for the whole one that the run comes to again."""
        aside = self.path(step).with_suffix(DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        return self.path(step).replace(aside)

    def load(self, step: int) -> None:
        """Raises ValueError where the snapshot is damaged, or of other modules; what it would have
        filled is undefined then."""
        state = self._state(0)
        read(self.path(step), state, alone=self.world.size == 1)
        for name, learner in self.learners.items():
            learner.load_state_dict(state[name])

    def _state(self, step: int) -> dict[str, Any]:
        learners = {name: learner.state_dict() for name, learner in self.learners.items()}
        return {**learners, "step": torch.tensor(step)}

    def _clear(self) -> None:
        """What was being written when a process was killed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path)


def steps_in(folder: Path) -> list[int]:
    """Of whole snapshots, rising."""
    found = [NAME.fullmatch(path.name) for path in folder.glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def find_snapshot(folder: Path, step: int | None) -> tuple[int, Path]:
    """Of `step`, or the last one. Raises ValueError that names those that are there."""
    steps = steps_in(folder)
    if not steps or (step is not None and step not in steps):
        found = ", ".join(map(str, steps)) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise ValueError(f"{folder} has no snapshot{wanted}; there are: {found}")
    step = steps[-1] if step is None else step
    return step, folder / f"step-{step:09}"


def read_averages(path: Path, name: str, module: nn.Module) -> None:
    """Into `module`, of the learner `name`, with what is not trained; moments are not read.

    Raises ValueError where it is of another module.
    """
    weights = {n: p.data for n, p in module.named_parameters() if p.requires_grad}
    fixed = {n: value for n, value in module.state_dict().items() if n not in weights}
    read(path, {name: {"ema": weights, "module": fixed}}, alone=True)


def read(path: Path, state: dict[str, Any], *, alone: bool) -> None:
    """Into the tensors of `state`. Raises ValueError where they are not the snapshot's, or it is
    damaged."""
    try:
        with quietly():
            load(state, checkpoint_id=path, no_dist=alone)
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        if not isinstance(first, Exception):  # Ctrl-C is no damage
            raise first from None
        reason = shorten(f"{type(first).__name__}: {first}", MAX_REASON).removesuffix(":")
        raise ValueError(f"{path} does not fit this run, or is damaged: {reason}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run: {error}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """One process alone is no accident, and what is damaged is said once, without tracebacks."""
    root = logging.getLogger()  # which torch's loader writes to itself
    was_disabled, root.disabled = root.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    finally:
        root.disabled = was_disabled


def sync(folder: Path) -> None:
    """A rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
