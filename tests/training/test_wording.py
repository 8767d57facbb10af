"""Numbers with their units."""

from __future__ import annotations

import pytest

from rae.training.wording import counted, duration, flop


def test_one_has_no_plural() -> None:
    said = [counted(number, "step") for number in (0, 1, 1.0, 1250, 22.6)]
    assert said == ["0 steps", "1 step", "1 step", "1,250 steps", "22.6 steps"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9, "9 s"), (75, "1 min 15 s"), (7500, "2 h 05 min"), (700_000, "8 d 02 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_operations_have_the_largest_unit_that_fits() -> None:
    said = [flop(number) for number in (2.5e19, 1e18, 9.99e14, 1.5e8)]
    assert said == ["25.00 EFLOP", "1.00 EFLOP", "999.00 TFLOP", "0.15 GFLOP"]
