"""What the trainer tells, and where it goes: a bar, `log.jsonl`, pictures, trackers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import Tensor

from rae.training.reports.display import Display, Row
from rae.training.reports.grid import make_grid
from rae.training.reports.run_log import LOG_FILE, RunLog
from rae.training.reports.trackers import Tracker
from rae.training.wording import counted

SAMPLES_FOLDER = "samples"
EVENTS_FILE = "events.log"
PLOT_FILE = "loss.png"
WINDOW_S = 120.0
"""Over which images/s and the time left are taken."""


class Speed:
    """Steps and images a second over the last `WINDOW_S`, or since the last time if that is
    longer. What is before the first time, compiling above all, does not count."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.marks: deque[tuple[float, int, int]] = deque()
        self.num_images = 0

    def add(self, step: int, num_images: int) -> tuple[float, float] | None:
        """Of `num_images` since the last time; None the first time."""
        now = self.clock()
        self.num_images += num_images
        self.marks.append((now, step, self.num_images))
        while len(self.marks) > 2 and now - self.marks[1][0] >= WINDOW_S:
            self.marks.popleft()
        then, first_step, first_images = self.marks[0]
        if now <= then:
            return None
        return (step - first_step) / (now - then), (self.num_images - first_images) / (now - then)


class RunReport:
    """Of a run in `folder`, for the first process.

    `flops_per_image` of a training step and `peak_flops` of all devices together give MFU, where
    both are known. Whatever cannot be written is said once, and training goes on.
    """

    def __init__(
        self,
        folder: Path,
        *,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        trackers: Sequence[Tracker] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.trackers = folder, list(trackers)
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.display = Display(console or Console())
        self.log = RunLog(folder / LOG_FILE)
        self.speed = Speed(clock)
        self.num_steps = 0
        self.troubles: set[str] = set()

    def start(self, step: int, num_steps: int) -> None:
        """After `step` of `num_steps` steps; later rows of the log are of a run that was cut."""
        self.num_steps = num_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        self._try(LOG_FILE, partial(self.log.start, step))
        self.trackers = [t for t in self.trackers if self._try(t.name, partial(t.start, step))]
        steps = counted(num_steps, "step")
        self.event(f"resumed after step {step:,} of {num_steps:,}" if step else f"started: {steps}")
        self.display.start(step, num_steps)

    def step(self, step: int, metrics: Mapping[str, float], num_images: int) -> None:
        """Means since the last time, and how many images all processes have seen since then."""
        row = self._row(step, metrics, num_images)
        self.display.show(row)
        self._try(LOG_FILE, partial(self.log.append, row.values()))
        for tracker in self.trackers:
            self._try(tracker.name, partial(tracker.show, row))

    def _row(self, step: int, metrics: Mapping[str, float], num_images: int) -> Row:
        speeds = self.speed.add(step, num_images)
        if speeds is None:
            return Row(step=step, num_steps=self.num_steps, metrics=metrics)
        steps_per_s, images_per_s = speeds
        mfu = None
        if self.flops_per_image and self.peak_flops:
            mfu = images_per_s * self.flops_per_image / self.peak_flops
        return Row(
            step=step,
            num_steps=self.num_steps,
            metrics=metrics,
            images_per_s=images_per_s,
            mfu=mfu,
            seconds_left=(self.num_steps - step) / steps_per_s if steps_per_s else None,
        )

    def samples(self, step: int, images: Tensor) -> None:
        """Of images (N, 3, H, W) in [0, 1]; the loss is drawn anew, too."""
        grid = make_grid(images)
        path = self.folder / SAMPLES_FOLDER / f"{step:07}.png"

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            grid.save(path)

        self._try(SAMPLES_FOLDER, write)
        for tracker in self.trackers:
            self._try(tracker.name, partial(tracker.samples, step, grid))
        self._plot()

    def event(self, text: str) -> None:
        """Something that happens rarely: on the console, and in `events.log` with its time."""
        self.display.line(text)
        line = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"

        def write() -> None:
            with (self.folder / EVENTS_FILE).open("a") as file:
                file.write(line)

        self._try(EVENTS_FILE, write)

    def close(self) -> None:
        self._plot()
        self.display.close()
        for tracker in self.trackers:
            self._try(tracker.name, tracker.close)

    def _plot(self) -> None:
        def draw() -> None:
            from rae.training.reports.plots import draw_runs

            draw_runs([self.log.path], self.folder / PLOT_FILE)

        if self.log.end:
            self._try(PLOT_FILE, draw)

    def _try(self, name: str, write: Callable[[], object]) -> bool:
        """A full disk, or a library that is not there, ends no run; it is said once."""
        try:
            write()
            return True
        except (OSError, ImportError) as error:
            if name not in self.troubles:
                self.troubles.add(name)
                self.display.line(f"{name}: {error}; training goes on without it")
            return False


class Silent:
    """The report of all processes but the first."""

    def start(self, step: int, num_steps: int) -> None:
        pass

    def step(self, step: int, metrics: Mapping[str, float], num_images: int) -> None:
        pass

    def samples(self, step: int, images: Tensor) -> None:
        pass

    def event(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
