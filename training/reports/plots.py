"""Curves of runs, from their logs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from rae.training.reports.run_log import read_log

LABELS = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "l1": "L1",
    "images_per_s": "images/s",
    "mfu": "MFU, %",
    "unreadable_images": "unreadable images",
}
SPEEDS = ("images_per_s", "mfu")
SMOOTH = ("lr", *SPEEDS)
"""Drawn as they are, from 0 on."""
# Okabe and Ito: told apart by the colour-blind, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLUMNS = 3
PANEL_INCHES = (4.2, 2.4)
LOSS_INCHES = 3.6
FEW = 20
"""Points: so many are marked, more are noise around a mean."""
LOG_RATIO = 10
"""Of the largest value to the smallest: from there on an axis is logarithmic."""

Curve = tuple[np.ndarray, np.ndarray]


def draw_runs(logs: Sequence[Path], out: Path) -> None:
    """Loss and whatever else the logs have over the steps, as a PNG; with several runs, in one
    colour each, named as their folders.

    Raises ImportError that names the extra to install, OSError for what cannot be read or
    written and ValueError for a log without rows.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "matplotlib is not installed: pip install 'rae-server[report]'"
        ) from error
    runs = {name: curves(path) for name, path in zip(names(logs), logs, strict=True)}
    keys = sorted_keys({key for run in runs.values() for key in run})
    lead, others = keys[0], keys[1:]
    num_rows = math.ceil(len(others) / COLUMNS)
    heights = [LOSS_INCHES, *[PANEL_INCHES[1]] * num_rows]
    figure = Figure((COLUMNS * PANEL_INCHES[0], sum(heights)), dpi=110, layout="constrained")
    grid = figure.add_gridspec(1 + num_rows, COLUMNS, height_ratios=heights)
    draw_panel(figure.add_subplot(grid[0, :]), lead, runs, is_first=True)
    for index, key in enumerate(others):
        axes = figure.add_subplot(grid[1 + index // COLUMNS, index % COLUMNS])
        draw_panel(axes, key, runs, is_first=False)
    figure.savefig(out, format="png")


def names(logs: Sequence[Path]) -> list[str]:
    """Of the folders; whole paths where two are alike."""
    short = [path.resolve().parent.name for path in logs]
    return short if len(set(short)) == len(short) else [str(path.parent) for path in logs]


def curves(path: Path) -> dict[str, Curve]:
    """Steps and values of each number in a log that is not 0 all the time."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in read_log(path):
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                points.setdefault(key, []).append((row["step"], value))
    if not points:
        raise ValueError(f"{path} has no rows")
    unit = {"mfu": 100.0}
    return {
        key: (np.array([s for s, _ in pairs]), unit.get(key, 1.0) * np.array([v for _, v in pairs]))
        for key, pairs in points.items()
        if key == "loss" or any(value for _, value in pairs)
    }


def sorted_keys(keys: set[str]) -> list[str]:
    """The loss first, then what it is made of, then lr and speeds."""
    order = ("loss", *sorted(keys - {"loss", "lr", "grad_norm", *SPEEDS, "unreadable_images"}))
    order = (*order, "grad_norm", "lr", *SPEEDS, "unreadable_images")
    return [key for key in order if key in keys]


def draw_panel(
    axes: Any,  # noqa: ANN401
    key: str,
    runs: dict[str, dict[str, Curve]],
    *,
    is_first: bool,
) -> None:
    for (name, run), colour in zip(runs.items(), cycle(COLOURS), strict=False):
        if key not in run:
            continue
        steps, values = run[key]
        is_noisy = key not in SMOOTH and len(values) > FEW
        if is_noisy:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        line = smoothed(values) if is_noisy else values
        marker = "." if len(values) <= FEW else ""
        axes.plot(steps, line, color=colour, linewidth=1.6, marker=marker, label=name)
    set_scale(axes, key, np.concatenate([run[key][1] for run in runs.values() if key in run]))
    axes.set_ylabel(LABELS.get(key, key.replace("_", " ")))
    axes.set_xlabel("step")
    axes.xaxis.set_major_formatter(step_label)
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if is_first and len(runs) > 1:
        axes.legend(frameon=False)
    elif is_first:
        axes.set_title(next(iter(runs)), loc="left")


def set_scale(axes: Any, key: str, values: np.ndarray) -> None:  # noqa: ANN401
    from matplotlib.ticker import LogLocator, NullFormatter

    if key in SMOOTH:
        axes.set_ylim(bottom=0)
    elif values.min() > 0 and values.max() / values.min() >= LOG_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def step_label(value: float, position: int | None = None) -> str:
    """500, 20k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """A centred mean over a 50th of the points, over those that there are at both ends."""
    half = max(1, len(values) // 100)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
