"""The initialisation of position tables; trained ones are loaded, so no golden number shows it."""

from __future__ import annotations

import math

import pytest

from rae.models.embedders import sincos_2d


def test_the_first_half_holds_the_column_and_the_second_the_row() -> None:
    token = sincos_2d(8, grid=4)[2 * 4 + 3].tolist()  # row 2, column 3; frequencies 1 and 1/100

    def half(position: int) -> list[float]:
        angles = [position, position / 100]
        return [*map(math.sin, angles), *map(math.cos, angles)]

    assert token == pytest.approx([*half(3), *half(2)], abs=1e-6)
