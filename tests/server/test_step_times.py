"""The cost model: exact numbers, no clock."""

from __future__ import annotations

import json
import math

import pytest

from rae.server.step_times import StepTimes


def test_padded_rows_take_the_time_of_their_bucket() -> None:
    times = StepTimes({8: 5.0, 1: 1.0, 2: 1.5}, {1: 0.25, 8: 0.75}, pads=True)
    assert [times.bucket(rows) for rows in (1, 2, 3, 8, 9)] == [1, 2, 8, 8, 9]
    assert [times.seconds(rows) for rows in (1, 2, 3, 8)] == [1.0, 1.5, 5.0, 5.0]
    assert times.seconds(16) == 10.0, "beyond the largest bucket in proportion"
    assert times.seconds(2, 1) == 1.75
    assert times.seconds(2, 2) == 2.25, "the guide has buckets of its own"
    assert times.rate(8) == 8 / 5.0


def test_without_buckets_times_lie_on_lines() -> None:
    times = StepTimes({2: 3.0, 4: 4.0, 8: 8.0}, {1: 0.5})
    assert times.bucket(3) == 3
    assert [times.seconds(rows) for rows in (1, 2, 3, 6, 8)] == [2.5, 3.0, 3.5, 6.0, 8.0]
    assert times.seconds(10) == 10.0, "by the last slope"
    assert times.seconds(2, 4) == 3.0 + 2.0, "one point alone: in proportion"
    assert (times.rate(1), times.rate(3), times.rate(8)) == (1 / 2.5, 3 / 3.5, 1.0)


def test_no_step_is_free() -> None:
    steep = StepTimes({4: 1.0, 8: 9.0})
    assert steep.seconds(1) == 0.25, "the line would be below zero"
    falling = StepTimes({4: 2.0, 8: 1.0})
    assert falling.seconds(6) == 1.5
    assert falling.seconds(100) == 1.0


@pytest.mark.parametrize("pads", [True, False])
def test_unmeasured_steps_take_a_second_whatever_their_rows(pads: bool) -> None:
    times = StepTimes(pads=pads)
    assert (times.bucket(5), times.seconds(5), times.seconds(64), times.rate(1)) == (
        5,
        1.0,
        1.0,
        1.0,
    )
    times.observe(4, 0, 0.5)
    assert times.seconds(4) == 0.5


def test_an_unmeasured_guide_is_taken_for_a_model() -> None:
    times = StepTimes({1: 1.0, 4: 2.0}, pads=True)
    assert times.seconds(4, 1) == 3.0


def test_observations_are_learned_and_others_stay() -> None:
    times = StepTimes({1: 1.0, 8: 4.0}, {1: 0.5, 8: 1.0}, pads=True)
    for _ in range(100):
        times.observe(5, 1, 9.0)
    assert times.seconds(5, 1) == pytest.approx(9.0, rel=1e-3)
    assert times.seconds(8) / times.guide[1] == pytest.approx(8.0), "both by one factor"
    assert (times.seconds(1), times.guide[8]) == (1.0, 1.0)


def test_observations_between_two_points_move_both() -> None:
    times = StepTimes({1: 1.0, 3: 2.0, 8: 4.0})
    for _ in range(100):
        times.observe(2, 0, 3.0)
    assert times.seconds(2) == pytest.approx(3.0, rel=1e-3)
    assert times.seconds(3) == pytest.approx(4.0, rel=1e-3)
    assert times.seconds(8) == 4.0


@pytest.mark.parametrize("outlier", [1e-6, 1e6])
def test_one_outlier_moves_a_time_by_little(outlier: float) -> None:
    times = StepTimes({1: 1.0}, pads=True)
    times.observe(1, 0, outlier)
    assert abs(math.log(times.seconds(1))) == pytest.approx(0.05)


def test_json_keeps_everything() -> None:
    times = StepTimes({1: 0.1, 64: 1 / 3}, {2: 0.7}, pads=True)
    back = StepTimes.from_json(times.to_json())
    assert (back.model, back.guide, back.pads) == (times.model, times.guide, True)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pads": 1}, "pads is true or false, not 1"),
        ({"more": 1}, "step times are pads, model and guide"),
        ({"model": [1.0]}, r"model is a table of seconds by rows, not \[1.0\]"),
        ({"model": {"x": 1.0}}, "model: 'x': 1.0 is no step time"),
        ({"guide": {"1": "a"}}, "guide: '1': 'a' is no step time"),
        ({"guide": {"1": True}}, "guide: '1': True is no step time"),
        ({"model": {"0": 1.0}}, "0 rows in 1.0 s is no step time"),
        ({"model": {"4": 0.0}}, "4 rows in 0.0 s is no step time"),
        ({"model": {"4": math.inf}}, "4 rows in inf s is no step time"),
        ({"model": {"4": math.nan}}, "4 rows in nan s is no step time"),
    ],
)
def test_other_json_is_refused(changes: dict[str, object], complaint: str) -> None:
    fields = {"pads": True, "model": {"1": 0.1}, "guide": {}} | changes
    with pytest.raises(ValueError, match=complaint):
        StepTimes.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pads": true, "model": {}}'])
def test_what_is_no_step_times_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        StepTimes.from_json(text)
