"""How far ahead the host is, with events that need no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from rae.server.in_flight import RUN_AHEAD, InFlight, StepTiming


class Event:
    """Recorded one second after the one before."""

    clock = itertools.count()
    waited: list[Event] = []

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = next(self.clock)

    def synchronize(self) -> None:
        self.waited.append(self)

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.seconds - self.seconds)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> InFlight:
    monkeypatch.setattr(Event, "waited", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return InFlight(torch.device("cuda"))


def test_the_oldest_step_is_waited_for_where_no_more_may_be_sent(on_cuda: InFlight) -> None:
    for rows in range(1, RUN_AHEAD + 1):
        assert on_cuda.wait() is None
        with on_cuda.step(rows, 0):
            next(Event.clock)  # a step takes two seconds
    assert not Event.waited
    assert on_cuda.wait() == StepTiming(1, 0, 2.0)
    assert len(Event.waited) == 1
    assert on_cuda.wait() is None


def test_what_fails_is_no_step(on_cuda: InFlight) -> None:
    for device in (on_cuda, InFlight(torch.device("cpu"))):
        for _ in range(RUN_AHEAD):
            with pytest.raises(ZeroDivisionError), device.step(1, 0):
                _ = 1 / 0
        assert device.wait() is None


def test_on_a_cpu_a_step_is_over_at_once() -> None:
    on_cpu = InFlight(torch.device("cpu"))
    with on_cpu.step(3, 1):
        pass
    timing = on_cpu.wait()
    assert timing is not None and timing[:2] == (3, 1) and 0 <= timing.seconds < 1
    assert on_cpu.wait() is None
