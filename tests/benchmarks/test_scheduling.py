"""The simulation, small, and what the benchmark makes of it."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scheduling(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scheduling")


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("simulation")


def test_short_requests_are_fast_and_none_pays_for_it(scheduling: ModuleType) -> None:
    figures = scheduling.simulate_gpus(1, saturated=300, arriving=300)
    assert all(goal["met"] for goal in figures["goals"].values()), figures["goals"]
    loaded = figures["at 70% of request-level"]
    for steps in ("10", "50", "250"):
        for figure in ("mean_s", "p95_s"):
            assert loaded["row-level"][steps][figure] < loaded["request-level"][steps][figure]
    assert 0.5 < figures["predicted / actual"]["10"]["median"] < 1.5


def test_many_gpus_are_compared_with_the_better_queue(scheduling: ModuleType) -> None:
    figures = scheduling.simulate_gpus(4, saturated=100, arriving=100)
    rates = figures["saturated images per s"]
    assert rates["one request"] < rates["request-level"]
    best = max(rates["request-level"], rates["request-level, central"])
    assert figures["goals"]["saturated"]["share"] == rates["row-level"] / best


def test_one_request_alone_takes_its_steps_in_every_arm(simulation: ModuleType) -> None:
    """An image of 10 steps with CFG: 9 evaluations of 2 rows, then decoding."""
    rivals = importlib.import_module("rival_schedulers")
    specs = [s for s in simulation.draw_specs(50, seed=0) if (s.steps, s.cfg) == (10, 3.0)][:2]
    expected = 9 * (1.15 + (5.5 - 1.15) / 7) / 1000 + 0.28e-3
    for make in (simulation.Scheduler, rivals.RequestLevel, rivals.OneRequest):
        devices = simulation.make_devices(make, 2)
        ended = simulation.simulate(simulation.make_requests(specs, [1.0, 5.0]), devices)
        assert [each.latency_s for each in ended] == pytest.approx([expected] * 2)


def test_batches_of_requests_run_to_their_end(simulation: ModuleType) -> None:
    """Two alike go together, what came between them and is unlike them waits for both."""
    rivals = importlib.import_module("rival_schedulers")
    spec = simulation.ImageSpec(class_label=0, seed=0, steps=10)
    unlike = simulation.ImageSpec(class_label=0, seed=0, steps=50)
    requests = simulation.make_requests([spec, unlike, spec], [0.0] * 3)
    (device,) = simulation.make_devices(rivals.RequestLevel, 1)
    first, second, last = simulation.simulate(requests, [device])
    pair_s = 9 * (1.15 + (5.5 - 1.15) / 7) / 1000 + 2 * 0.28e-3
    assert (first.end, second.end) == pytest.approx((pair_s, pair_s))
    assert last.end == pytest.approx(pair_s + 49 * 1.15e-3 + 0.28e-3)
    assert (first.steps, last.steps) == (10, 50)


def test_arrivals_are_poisson_or_all_at_once(simulation: ModuleType) -> None:
    arrivals = simulation.draw_arrivals(20_000, rate=4.0, seed=0)
    assert arrivals[-1] == pytest.approx(5_000, rel=0.02)
    assert simulation.draw_arrivals(3, rate=math.inf, seed=0) == [0.0] * 3


@pytest.mark.parametrize("arm", ["Scheduler", "RequestLevel", "OneRequest"])
def test_the_engine_serves_with_every_arm(
    scheduling: ModuleType, simulation: ModuleType, arm: str
) -> None:
    specs = [spec for spec in simulation.draw_specs(20, seed=0) if spec.steps == 10][:3]
    ended = scheduling.run_engine(getattr(scheduling, arm), specs, [0.0, 0.01, 0.3])
    assert [each.arrival for each in ended] == pytest.approx([0.0, 0.01, 0.3], abs=0.2)
    assert all(0 < each.latency_s < 60 for each in ended)


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    scheduling: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["scheduling.py", "--plot", "figure.png"])
    with pytest.raises(SystemExit, match="--plot needs matplotlib"):
        scheduling.main()
