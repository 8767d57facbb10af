"""How the scripts of the paper's claims draw their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def over_seeds(
    runs: Sequence[Sequence[Mapping[str, Any]]], name: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Of runs judged at the same steps: the steps, and the mean, least and greatest of a figure."""
    values = [[row[name] for row in rows] for rows in zip(*runs, strict=True)]
    means = [sum(row) / len(row) for row in values]
    return [row["step"] for row in runs[0]], means, list(map(min, values)), list(map(max, values))


def save(figure: Figure, path: Path) -> None:
    """A PNG of 64 colours."""
    from PIL import Image

    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def polish(axes: Axes) -> None:
    """No frame, and plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_yscale() == "log":
        low, high = axes.get_ylim()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        if high < 100 * low:  # hardly a power of ten to be seen
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")


def pretty(name: str) -> str:
    return name.replace("^DH", "$^{DH}$")


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Texts in their colours right of points (x, y, text, colour), moved apart where they meet."""
    figure = axes.figure
    figure.canvas.draw()
    height, lowest = figure.dpi / 72 * 11, -float("inf")
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        pixel = axes.transData.transform((x, y))[1]
        lowest = max(pixel, lowest + height)
        axes.annotate(
            pretty(text),
            (x, y),
            xytext=(6, (lowest - pixel) * 72 / figure.dpi),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            annotation_clip=False,
        )
