"""What a watchdog sees of threads that work."""

from __future__ import annotations

import threading
import time

import pytest

from rae.server.activity import Activity


def test_the_oldest_work_is_told() -> None:
    activity = Activity()
    assert activity.longest() == (0.0, 0.0)
    started, ended = threading.Event(), threading.Event()

    def work() -> None:
        with activity.working(5.0):
            started.set()
            ended.wait(30)

    before = time.perf_counter()
    other = threading.Thread(target=work)
    other.start()
    assert started.wait(30)
    with activity.working(1.0):
        seconds, expected_s = activity.longest()
    assert 0 < seconds < time.perf_counter() - before and expected_s == 5.0
    ended.set()
    other.join()
    assert activity.longest() == (0.0, 0.0)


def test_work_that_fails_is_over() -> None:
    activity = Activity()
    with pytest.raises(ValueError, match="broken"), activity.working(1.0):
        raise ValueError("broken")
    assert activity.longest() == (0.0, 0.0)
