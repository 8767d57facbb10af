"""The cost model: how long a step takes, by its rows."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Self

SMOOTHING = 0.1
# A step that took three times as long, say while the process was paused, counts like one of 1.65.
LARGEST_SURPRISE = 0.5
UNMEASURED_S = 1.0


class StepTimes:
    """Seconds of one step, by rows of the model and of the guide, which runs after it.

    Each table gives seconds by number of rows. With `pads` (CUDA) rows are filled up to the next
    number of the table; without (CPU) times lie on lines between the measured ones. Outside the
    table a time is proportional to the rows; without `pads` it goes on by the last slope. Until
    something is measured a step takes one second whatever its rows: it is as full as it can be.
    A guide that was not measured is taken for a model.

    Raises ValueError for rows or seconds that are not positive.
    """

    def __init__(
        self,
        model: Mapping[int, float] | None = None,
        guide: Mapping[int, float] | None = None,
        *,
        pads: bool = False,
    ) -> None:
        self.pads = pads
        self.model = dict(sorted((model or {}).items()))
        self.guide = dict(sorted((guide or {}).items()))
        for rows, seconds in (*self.model.items(), *self.guide.items()):
            if rows < 1 or not 0 < seconds < math.inf:
                raise ValueError(f"{rows} rows in {seconds} s is no step time")

    def rate(self, rows: int) -> float:
        """The most rows of the model per second, in steps of at most `rows`."""
        return max(n / self.seconds(n) for n in {rows, *(n for n in self.model if n < rows)})

    def bucket(self, rows: int) -> int:
        """The rows of the model that are evaluated for `rows`."""
        if not (self.pads and self.model):
            return rows
        return max(rows, self._neighbours(self.model, rows)[1])

    def seconds(self, model_rows: int, guide_rows: int = 0) -> float:
        guide = self._lookup(self.guide or self.model, guide_rows) if guide_rows else 0.0
        return self._lookup(self.model, model_rows) + guide

    def observe(self, model_rows: int, guide_rows: int, seconds: float) -> None:
        """Correct the times of such a step a little, by what one took."""
        if not self.model:
            self.model[model_rows] = seconds
            return
        surprise = math.log(seconds / self.seconds(model_rows, guide_rows))
        bounded = min(max(surprise, -LARGEST_SURPRISE), LARGEST_SURPRISE)
        factor = math.exp(SMOOTHING * bounded)
        for table, rows in ((self.model, model_rows), (self.guide, guide_rows)):
            for key in set(self._neighbours(table, rows)) if rows and table else ():
                table[key] *= factor

    def to_json(self) -> str:
        return json.dumps({"pads": self.pads, "model": self.model, "guide": self.guide})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError for anything but what `to_json` writes."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.keys() != {"pads", "model", "guide"}:
            raise ValueError(f"step times are pads, model and guide, not {text[:80]!r}")
        if not isinstance(fields["pads"], bool):
            raise ValueError(f"pads is true or false, not {fields['pads']!r}")
        tables = [_read_table(name, fields[name]) for name in ("model", "guide")]
        return cls(*tables, pads=fields["pads"])

    def _lookup(self, table: dict[int, float], rows: int) -> float:
        if not table:
            return UNMEASURED_S
        below, above = self._neighbours(table, rows)
        if below == above:
            return table[above] * (rows / above if rows > above or not self.pads else 1.0)
        slope = (table[above] - table[below]) / (above - below)
        if rows < below:  # a small step is never cheaper by the row
            return max(table[below] - slope * (below - rows), table[below] * rows / below)
        line = table[below] + slope * (rows - below)
        return max(line, min(table[below], table[above]))  # nor does a larger one take less time

    def _neighbours(self, table: dict[int, float], rows: int) -> tuple[int, int]:
        """The numbers of a table between which `rows` lie, or the nearest ones."""
        numbers = list(table)
        above = min(bisect_left(numbers, rows), len(numbers) - 1)
        if self.pads or numbers[above] == rows or len(numbers) == 1:
            return numbers[above], numbers[above]
        above = max(above, 1)
        return numbers[above - 1], numbers[above]


def _read_table(name: str, table: object) -> dict[int, float]:
    if not isinstance(table, dict):
        raise ValueError(f"{name} is a table of seconds by rows, not {table!r}")
    for rows, seconds in table.items():
        if (
            not rows.isdecimal()
            or isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
        ):
            raise ValueError(f"{name}: {rows!r}: {seconds!r} is no step time")
    return {int(rows): float(seconds) for rows, seconds in table.items()}
