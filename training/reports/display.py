"""What somebody who watches a run sees: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

SMOOTHING = 0.9
"""Of the loss that is shown: the part that the last one keeps."""
HOUR_S, DAY_S = 3600, 86_400


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known after `step` of `num_steps` steps; None is not known, or not yet."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    images_per_s: float | None = None
    mfu: float | None = None
    seconds_left: float | None = None

    def values(self) -> dict[str, float | None]:
        """As logs have them; speeds only where they are known."""
        speeds = {"images_per_s": self.images_per_s, "mfu": self.mfu}
        known = {name: value for name, value in speeds.items() if value is not None}
        return {"step": self.step, **self.metrics, **known}


@dataclass
class Smoothed:
    """A running mean without the bias of its start."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> float:
        self.total = SMOOTHING * self.total + (1 - SMOOTHING) * value
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        return self.total / self.weight


@dataclass
class Display:
    """On `console`. `start` opens the bar, `close` leaves it as it was last."""

    console: Console
    loss: Smoothed = field(default_factory=Smoothed)
    progress: Progress | None = None
    task: TaskID = field(default_factory=lambda: TaskID(0))

    def start(self, step: int, num_steps: int) -> None:
        if not self.console.is_terminal:
            return
        columns = (
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[status]}"),
        )
        self.progress = Progress(*columns, console=self.console, refresh_per_second=2, expand=True)
        self.task = self.progress.add_task("", total=num_steps, completed=step, status="")
        self.progress.start()

    def show(self, row: Row) -> None:
        status = "  ".join(self.parts(row))
        if self.progress is not None:
            self.progress.update(self.task, completed=row.step, status=status)
        else:
            self.line(f"step {row.step:,}/{row.num_steps:,}  {status}")

    def parts(self, row: Row) -> list[str]:
        parts = []
        if "loss" in row.metrics:
            parts.append(f"loss {self.loss.add(row.metrics['loss']):.4f}")
        if "lr" in row.metrics:
            parts.append(f"lr {row.metrics['lr']:.2e}")
        if row.images_per_s is not None:
            parts.append(f"{row.images_per_s:,.{0 if row.images_per_s >= 100 else 1}f} images/s")
        if row.mfu is not None:
            parts.append(f"MFU {row.mfu:.1%}")
        if row.metrics.get("unreadable_images"):
            parts.append(f"{row.metrics['unreadable_images']:,.0f} unreadable")
        if row.seconds_left is not None:
            parts.append(f"{duration(row.seconds_left)} left")
        return parts

    def line(self, text: str) -> None:
        """Above the bar, where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def duration(seconds: float) -> str:
    """4 d 07 h, 3 h 05 min, 12 min 08 s."""
    whole = round(seconds)
    for size, unit, part, part_unit in (
        (DAY_S, "d", HOUR_S, "h"),
        (HOUR_S, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02} {part_unit}"
    return f"{whole} s"
