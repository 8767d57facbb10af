"""The loop with the real model: who gets in, who leaves, and what everybody gets."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from rae.models.checkpoint import load_checkpoint
from rae.models.config import GuidanceMethod
from rae.server.engine import Engine
from rae.server.errors import DeadlineError, EngineClosedError, QueueFullError
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec, Request
from rae.server.runner import Runner
from rae.server.settings import EngineSettings
from rae.server.step_times import StepTimes

TIMEOUT_S = 60
GUIDE = 60916 / 108500  # by parameters


@pytest.fixture
def make_engine(tiny_checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def make(max_batch: int = 8, max_queue: float = 50_000) -> Engine:
        settings = EngineSettings(
            model=tiny_checkpoint,
            device="cpu",
            precision="fp32",
            max_batch=max_batch,
            max_queue=max_queue,
        )
        engine = Engine(load_checkpoint(tiny_checkpoint), settings, Metrics())
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def spec(seed: int, steps: int = 5, cfg: float = 1.5, class_label: int = 1) -> ImageSpec:
    return ImageSpec(class_label=class_label, seed=seed, steps=steps, cfg=cfg)


def images(request: Request) -> Sequence[np.ndarray]:
    return request.future.result(TIMEOUT_S).images


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_image_is_the_same_alone_and_among_others(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=8)
    engine.start()
    (alone,) = images(engine.submit([spec(7)], "alone"))
    others = [
        engine.submit([spec(100 + i, 3 + i, 1 + i / 4, i % 4)], f"other {i}") for i in range(20)
    ]
    among = images(engine.submit([spec(6), spec(7)], "among"))
    for other in others:
        assert images(other)[0].shape == (16, 16, 3)
    np.testing.assert_array_equal(alone, among[1])
    assert (among[0] != alone).any()


def test_a_short_request_does_not_wait_for_a_long_one(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    long, short = engine.submit([spec(1, 400)], "long"), engine.submit([spec(2, 10)], "short")
    for _ in range(9):
        engine.step()
    assert short.future.done() and not long.future.done()
    step_until_done(engine, long)


def test_a_cancelled_request_frees_its_slot_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=2)
    (expected,) = images_by_stepping(engine, [spec(3)])
    gone = engine.submit([spec(1, 900)], "gone")
    engine.step()
    assert (gone.num_running, engine.load().running) == (1, 1)
    stays, late = engine.submit([spec(3)], "stays"), engine.submit([spec(2)], "late")
    engine.cancel(gone)
    engine.step()
    assert gone.num_running == 0 and gone.samples[0].step == 1
    step_until_done(engine, stays, late)
    np.testing.assert_array_equal(images(stays)[0], expected)
    assert engine.load().running == 0 and engine.load().queued_cost == 0
    with pytest.raises(CancelledError):
        gone.future.result(0)


def images_by_stepping(engine: Engine, specs: Sequence[ImageSpec]) -> Sequence[np.ndarray]:
    request = engine.submit(specs, "stepped")
    step_until_done(engine, request)
    return images(request)


def step_until_done(engine: Engine, *requests: Request) -> None:
    for _ in range(1000):
        if all(request.future.done() for request in requests):
            return
        engine.step()
    raise AssertionError("somebody never ends")


def test_the_queue_is_bounded_and_an_idle_engine_takes_anything(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_queue=100)
    large = engine.submit([spec(1, 200, cfg=1.0)], "larger than the bound")
    with pytest.raises(QueueFullError) as full:
        engine.submit([spec(2)], "refused")
    assert (full.value.queued, full.value.limit) == (199, 100)
    assert full.value.retry_after_s >= 1
    for _ in range(150):
        engine.step()
    accepted = engine.submit([spec(2)], "accepted")  # 49 left, 8 more
    assert (accepted.cost, engine.load().queued_cost) == (8, 57)
    retried = engine.submit([spec(3, 100)], "tried again", bounded=False)
    assert engine.load().queued_cost == 57 + retried.cost
    engine.cancel(retried)
    step_until_done(engine, large, accepted)
    assert engine.load().queued_cost == 0


def test_a_failed_warm_up_is_said_and_nobody_waits(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rows: int) -> None:
        raise RuntimeError("no such kernel")

    engine = make_engine()
    monkeypatch.setattr(engine._runner.decoder, "rows", fail)
    waiting = engine.submit([spec(1)], "waiting")
    engine.start()
    with pytest.raises(EngineClosedError):
        waiting.future.result(TIMEOUT_S)
    assert engine.failure == "the warm-up failed (RuntimeError)"
    assert engine.failure_detail == "the warm-up failed: RuntimeError: no such kernel"
    assert not engine.ready
    with pytest.raises(EngineClosedError):
        engine.submit([spec(2)], "late")


def test_closing_fails_what_is_left_and_refuses_more(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=1)
    engine.start()
    running, waiting = engine.submit([spec(1, 1000)], "r"), engine.submit([spec(2, 1000)], "w")
    engine.close()
    for request in (running, waiting):
        with pytest.raises(EngineClosedError):
            request.future.result(0)
    with pytest.raises(EngineClosedError):
        engine.submit([spec(3)], "late")


class Noted(Metrics):
    """What an engine tells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.saved = 0.0

    def evaluated(self, rows: float, saved: float) -> None:
        self.rows += rows
        self.saved += saved


@pytest.mark.parametrize(
    ("cfg", "method", "interval", "rows", "saved"),
    [
        (1.0, "cfg", (0.0, 1.0), 10, 0),
        (2.0, "cfg", (0.0, 1.0), 20, 0),
        (2.0, "cfg", (0.0, 0.0), 10, 10),
        (2.0, "cfg", (0.5, 1.0), 17, 3),
        (2.0, "autoguidance", (0.5, 1.0), 10 + 7 * GUIDE, 3 * GUIDE),
        (1.0, "autoguidance", (0.5, 1.0), 10, 0),
    ],
)
def test_rows_and_what_the_interval_saves_are_told(
    make_engine: Callable[..., Engine],
    cfg: float,
    method: GuidanceMethod,
    interval: tuple[float, float],
    rows: float,
    saved: float,
) -> None:
    engine = make_engine()
    engine._observer = noted = Noted()
    images_by_stepping(
        engine,
        [
            ImageSpec(
                class_label=1,
                seed=seed,
                steps=11,
                cfg=cfg,
                guidance_method=method,
                guidance_interval=interval,
            )
            for seed in range(3)
        ],
    )
    assert noted.rows == pytest.approx(3 * rows)
    assert noted.saved == pytest.approx(3 * saved)


def test_the_null_label_saves_nothing(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine._observer = noted = Noted()
    images_by_stepping(engine, [spec(1, 11, cfg=2.0, class_label=4)])
    assert (noted.rows, noted.saved) == (10, 0)


def test_load_is_what_is_left_at_the_speed_of_full_steps(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_batch=4)
    engine._scheduler.step_times = StepTimes({1: 1.0, 4: 2.0})
    assert engine.load()[4:] == (0.0, 2.0)
    engine.submit([spec(1, 11, cfg=1.0)], "alone")
    assert engine.load()[4:] == (10.0, 2.0)
    engine.submit([spec(seed, 11, cfg=1.0) for seed in range(3)], "more")
    assert engine.load()[4:] == (20.0, 2.0)


def test_who_is_late_is_told_and_touches_nobody(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    late, stays = (
        engine.submit([spec(1, 900)], "late", deadline_s=0.2),
        engine.submit([spec(2)], ""),
    )
    step_until_done(engine, stays)
    time.sleep(0.2)
    engine.step()
    with pytest.raises(DeadlineError, match="the deadline of 200 ms has passed"):
        late.future.result(0)
    assert engine.load().running == 0 and engine.load().queued_cost == 0


def test_what_is_urgent_goes_first(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch=2)
    low = engine.submit([spec(1, 3)], "low", priority="low")
    normal = engine.submit([spec(2, 9)], "normal")
    high = engine.submit([spec(3, 20)], "high", priority="high")
    step_until_done(engine, high)
    assert not normal.future.done() and not low.future.done()
    step_until_done(engine, normal)
    assert not low.future.done()
    step_until_done(engine, low)


def test_what_is_done_is_let_go_before_its_deadline(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    request = engine.submit([spec(1)], "done", deadline_s=86_400)
    step_until_done(engine, request)
    engine.step()
    done = weakref.ref(request)
    del request
    gc.collect()
    assert done() is None


def test_a_device_that_does_not_recover_is_given_up(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(rows: object) -> None:
        raise RuntimeError("an illegal memory access")

    engine = make_engine()
    engine.start()
    wait_until(lambda: engine.ready)
    monkeypatch.setattr(engine._runner, "step", fail)
    monkeypatch.setattr(engine._runner, "works", lambda: False)
    with pytest.raises(EngineClosedError):
        engine.submit([spec(1)], "first").future.result(TIMEOUT_S)
    wait_until(lambda: engine.failure is not None)
    assert engine.failure == "the engine failed (RuntimeError)"
    assert not engine.ready
    with pytest.raises(EngineClosedError):
        engine.submit([spec(2)], "late")


def test_the_device_is_that_of_the_thread_that_steps(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a second GPU's worker would launch its kernels on the first."""
    entered: list[str] = []
    monkeypatch.setattr(
        Runner, "enter_thread", lambda self: entered.append(threading.current_thread().name)
    )
    engine = make_engine()
    engine.start()
    assert images(engine.submit([spec(1)], "one"))
    assert entered == ["MainThread", "engine"]
