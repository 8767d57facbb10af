"""What throughput.py found: a JSON with everything, a CSV with a line per arm and batch, plots."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = "part arm batch images_per_s ms_per_step decode_ms of_the_peak of_the_linears".split()
COLUMNS += "ours_over_it peak_gib turns error model method cfg steps precision".split()
COLUMNS += ["device", "torch", "date", "commit"]
Row = dict[str, Any]


class Figures:
    """`rows` and `facts` of a run, written to a folder as often as there is news."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts = out, facts
        self.rows: list[Row] = []

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.facts | {"rows": self.rows}, indent=1)
        (self.out / "throughput.json").write_text(text + "\n")
        with (self.out / "throughput.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**self.facts, **row} for row in self.rows)

    def plot(self) -> None:
        """A PNG of the sweep and one of the ablation; one line says so without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            sys.stderr.write(f"throughput: no plots, they need matplotlib: {error}\n")
            return
        title = f"{self.facts['model']}, {self.facts['method']}, {self.facts['device']}"
        timed = [row for row in self.rows if row["turns"]]
        swept = [row for row in timed if row["part"] != "ablation"]
        stages = [row for row in timed if row["part"] == "ablation"]
        if swept:
            figure = Figure(figsize=(11, 4.5), layout="constrained")
            left, right = figure.subplots(1, 2)
            plot_batches(left, swept, "images_per_s", "images per second")
            plot_batches(right, swept, "of_the_peak", "of one large product's FLOP/s")
            figure.suptitle(title)
            figure.savefig(self.out / "sweep.png", dpi=120)
        if stages:
            figure = Figure(figsize=(9, 0.6 * len(stages) + 1.2), layout="constrained")
            plot_stages(figure.subplots(), stages)
            figure.suptitle(title)
            figure.savefig(self.out / "ablation.png", dpi=120)


def plot_batches(axes: Axes, rows: list[Row], column: str, label: str) -> None:
    """A line per arm; ours is timed in several parts, and drawn as the first has it."""
    for name in dict.fromkeys(row["arm"] for row in rows):
        by_batch = {row["batch"]: row[column] for row in reversed(rows) if row["arm"] == name}
        points = sorted(by_batch.items())
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    batches = sorted({row["batch"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="images in a batch", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend()


def plot_stages(axes: Axes, rows: list[Row]) -> None:
    """A bar per stage from the top down, with its gain over the one before and over the first."""
    rates = [row["images_per_s"] for row in rows]
    names = [f"{row['arm']} ({row['batch']})" for row in rows]
    axes.barh(names, rates)
    axes.invert_yaxis()
    for place, rate in enumerate(rates):
        gain = f"  {rate:.3g}"
        if place:
            gain += f", × {rate / rates[place - 1]:.2f}, {rate / rates[0]:.1f} in all"
        axes.text(rate, place, gain, va="center")
    axes.set_xlim(right=1.6 * max(rates))
    axes.set_xlabel("images per second (batch in brackets)")
