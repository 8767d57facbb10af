"""What somebody who watches a run sees: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from rae.training.wording import duration


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
class Display:
    """On `console`. `start` opens the bar, `close` leaves it as it was last."""

    console: Console
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
        status = "  ".join(parts(row))
        if self.progress is not None:
            self.progress.update(self.task, completed=row.step, status=status)
        else:
            self.line(f"step {row.step:,}/{row.num_steps:,}  {status}")

    def line(self, text: str) -> None:
        """Above the bar, where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


def parts(row: Row) -> Iterator[str]:
    """What is known, as it is in the log: means since the row before."""
    if "loss" in row.metrics:
        yield f"loss {row.metrics['loss']:.4f}"
    if "lr" in row.metrics:
        yield f"lr {row.metrics['lr']:.2e}"
    if row.images_per_s is not None:
        yield f"{row.images_per_s:,.{0 if row.images_per_s >= 100 else 1}f} images/s"
    if row.mfu is not None:
        yield f"MFU {row.mfu:.1%}"
    if row.metrics.get("unreadable_images"):
        yield f"{row.metrics['unreadable_images']:,.0f} unreadable"
    if row.seconds_left is not None:
        yield f"{duration(row.seconds_left)} left"
