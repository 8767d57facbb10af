"""What a folder of benchmarks/gpu.sh has, as Markdown: a forward by batch, and the goals.

    python benchmarks/goals.py FOLDER

What was not measured, or failed, is a dash. Exits 1 unless every goal is met.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = "DiTDH-XL-256"
ARMS = ("ours", "authors, bf16", "authors, fp32", "authors, compiled bf16")
# Parts of gpu.sh that time a forward; the second has the authors' compiled code.
FORWARDS = ("none", "compiled")
TRAINING_RATIO = "faster_compiled_ms"  # of train_step.py
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Goal:
    name: str
    bound: float
    measured: float | None
    more_is_better: bool = True

    @property
    def is_met(self) -> bool:
        sign = 1 if self.more_is_better else -1
        return self.measured is not None and sign * self.measured >= sign * self.bound

    def __str__(self) -> str:
        relation = "at least" if self.more_is_better else "at most"
        verdict = "met" if self.is_met else "**not met**"
        if self.measured is None:
            verdict = "not measured"
        return f"| {self.name} | {relation} {self.bound:g} | {number(self.measured)} | {verdict} |"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def read(path: Path) -> dict[str, Any]:
    """A benchmark's JSON; nothing where there is none, or it is of another model."""
    figures: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return figures if figures.get("model") == MODEL else {}


def rows_of(folder: Path, *parts: str) -> Rows:
    """With figures; those that failed have none."""
    found = [read(folder / part / "throughput.json").get("rows", []) for part in parts]
    return [row for rows in found for row in rows if row["turns"]]


def find(rows: Rows, arm: str, batch: int, column: str) -> float | None:
    """The first part's, where several have it."""
    found = (row[column] for row in rows if row["arm"] == arm and row["batch"] == batch)
    return next(found, None)


def goals(folder: Path) -> list[Goal]:
    rows = rows_of(folder, *FORWARDS)
    guided = [r["images_per_s"] for r in rows_of(folder, "autoguidance") if r["arm"] == "ours"]
    alone_s = read(folder / "http.json").get("alone_s", {}).get("p50")
    forward_ms = find(rows, "ours", 32, "ms_per_step")
    eager, compiled = (find(rows, arm, 32, "ours_over_it") for arm in (ARMS[1], ARMS[3]))
    # The authors' trainer cannot run without torch.compile.
    training = read(folder / "train-step-XL.json").get("bf16", {}).get("64", {})
    return [
        Goal("32 images: ms a forward", 18, forward_ms, more_is_better=False),
        Goal("AutoGuidance: images/s", 25, max(guided, default=None)),
        Goal("one image over HTTP: ms", 56, alone_s and 1000 * alone_s, more_is_better=False),
        Goal("32 images: times the authors' eager bf16", 2.2, eager),
        Goal("32 images: times the authors' compiled bf16", 1.3, compiled),
        Goal("training, both compiled: times the authors'", 1.3, training.get(TRAINING_RATIO)),
    ]


def lines(folder: Path) -> Iterator[str]:
    found = (read(folder / part / "throughput.json") for part in FORWARDS)
    facts: dict[str, Any] = next(filter(None, found), {})
    named = ("model", "device", "torch", "triton", "cuda", "date", "commit")
    yield ", ".join(f"{name} {facts[name]}" for name in named if facts.get(name))
    rows = rows_of(folder, *FORWARDS)
    yield ""
    yield f"| images | {', ms | '.join(ARMS)}, ms | ours, of one large product's rate |"
    yield "|---" * (len(ARMS) + 2) + "|"
    for batch in sorted({row["batch"] for row in rows}):
        times = [number(find(rows, arm, batch, "ms_per_step")) for arm in ARMS]
        share = number(find(rows, "ours", batch, "of_the_peak"))
        yield f"| {batch} | {' | '.join(times)} | {share} |"
    yield ""
    yield "| goal | bound | measured | |"
    yield "|---|---|---|---|"
    yield from map(str, goals(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    if not folder.is_dir():
        sys.exit(f"goals: {folder} is no folder")
    sys.stdout.write("\n".join(lines(folder)) + "\n")
    return 0 if all(goal.is_met for goal in goals(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
