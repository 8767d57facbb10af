"""Faults stay with who caused them: everybody else has the bytes of an undisturbed run."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
import torch

from rae.models.checkpoint import load_checkpoint, save_checkpoint
from rae.server.decoding import Decoding
from rae.server.engine import Engine
from rae.server.errors import GenerationError
from rae.server.graphs import Buckets, Replayed
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec, Request
from rae.server.settings import EngineSettings
from rae.server.step_times import StepTimes

CULPRIT = 13
TIMEOUT_S = 60

MakeEngine = Callable[..., Engine]


class Fixed(StepTimes):
    """Steps are as full as they can be, whatever one took."""

    def observe(self, model_rows: int, guide_rows: int, seconds: float) -> None:
        pass


@pytest.fixture
def make_engine(tiny_checkpoint: Path) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(max_batch: int = 16, folder: Path = tiny_checkpoint) -> Engine:
        settings = EngineSettings(device="cpu", precision="fp32", max_batch=max_batch)
        engine = Engine(load_checkpoint(folder), settings, Metrics())
        engine._scheduler.step_times = Fixed({1: 1.0, 64: 1.0}, pads=True)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="session")
def poisoned_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class two gives NaN: what is written must be finite, what comes of it need not."""
    whole = load_checkpoint(tiny_checkpoint)
    whole.dit_dh.get_parameter("y_embedder.embedding_table.weight")[2] = 3e38
    folder = tmp_path_factory.mktemp("poisoned") / "checkpoint"
    save_checkpoint(folder, whole.config, whole.dit_dh, whole.rae, whole.guide)
    return folder


def spec(seed: int, steps: int = 6, cfg: float = 1.5, class_label: int = 1) -> ImageSpec:
    return ImageSpec(class_label=class_label, seed=seed, steps=steps, cfg=cfg)


def step_until_done(engine: Engine, requests: Sequence[Request]) -> None:
    for _ in range(100):
        if not engine._scheduler.has_work:
            break
        engine.step()
    assert not wait([request.future for request in requests], TIMEOUT_S).not_done


def images(request: Request) -> Sequence[np.ndarray]:
    return request.future.result(TIMEOUT_S).images


def failure(request: Request) -> tuple[str, str]:
    error = request.future.exception(TIMEOUT_S)
    assert isinstance(error, GenerationError)
    return error.reason, str(error)


def solo(engine: Engine, one: ImageSpec) -> np.ndarray:
    request = engine.submit([one], "alone")
    step_until_done(engine, [request])
    return images(request)[0]


def check_undisturbed(engine: Engine, requests: Sequence[Request]) -> None:
    """All bytes are those of each image alone on an engine that has recovered."""
    assert engine.load()[:3] == (0, 0, 0.0)
    assert sorted(engine._scheduler._free) == list(range(engine.num_slots))
    assert engine.activity() == (0.0, 0.0)
    for request in requests:
        assert request.num_running == 0
        for sample, image in zip(request.samples, images(request), strict=True):
            np.testing.assert_array_equal(image, solo(engine, sample.spec))


INNOCENT = [[spec(1)], [spec(2, 9, 1.0)], [spec(3, 4), spec(4, 4)], [spec(5), spec(6, 5, 3.0, 0)]]


def submit(engine: Engine, *groups: Sequence[ImageSpec]) -> list[Request]:
    return [engine.submit(specs, str(number)) for number, specs in enumerate(groups)]


@pytest.mark.parametrize("has_receiver", [False, True], ids=["at once", "in a thread"])
def test_what_is_not_finite_fails_its_own_request(
    make_engine: MakeEngine,
    poisoned_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_receiver: bool,
) -> None:
    engine = make_engine(64, poisoned_checkpoint)
    if has_receiver:  # as on CUDA
        engine._receiver = ThreadPoolExecutor(1)
    bad, mixed = [spec(CULPRIT, class_label=2)], [spec(7), spec(8, class_label=2), spec(9, 9)]
    *innocent, alone, shared = requests = submit(engine, *INNOCENT, bad, mixed)
    decode, decoded = engine._runner.decode, list[set[int]]()

    def noted(slots: Sequence[int]) -> Decoding:
        decoded.append({engine._runner._images[slot][0].seed for slot in slots})
        return decode(slots)

    monkeypatch.setattr(engine._runner, "decode", noted)
    step_until_done(engine, requests)
    assert {1, 5, 7, 8, CULPRIT} in decoded, "good ones and bad ones share a batch"
    assert failure(alone) == ("non_finite", "the image of class 2 and seed 13 is not finite")
    assert failure(shared) == ("non_finite", "the image of class 2 and seed 8 is not finite")
    if engine._receiver is not None:
        engine._receiver.shutdown()  # what it still does is counted
        engine._receiver = None
    check_undisturbed(engine, innocent)


def fail_culprit(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """Let the runner fail wherever the culprit's image is in."""
    runner = engine._runner
    start, step, decode = runner.start, runner.step, runner.decode

    def seed_in(slot: int) -> int:
        return runner._images[slot][0].seed

    def failing_start(slot: int, one: ImageSpec) -> None:
        if where == "admit" and one.seed == CULPRIT:
            raise error
        start(slot, one)

    def failing_step(rows: Sequence[tuple[int, int]]) -> None:
        if where == "step" and (CULPRIT, 3) in [(seed_in(slot), step) for slot, step in rows]:
            raise error
        step(rows)

    def failing_decode(slots: Sequence[int]) -> object:
        if where == "decode" and CULPRIT in map(seed_in, slots):
            raise error
        return decode(slots)

    monkeypatch.setattr(runner, "start", failing_start)
    monkeypatch.setattr(runner, "step", failing_step)
    monkeypatch.setattr(runner, "decode", failing_decode)


@pytest.mark.parametrize("where", ["admit", "step", "decode"])
@pytest.mark.parametrize("max_batch", [1, 16])
def test_only_the_culprits_request_fails(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, where: str, max_batch: int
) -> None:
    engine = make_engine(max_batch)
    fail_culprit(engine, monkeypatch, where, RuntimeError("secret: /home"))
    culprit = [spec(10), spec(CULPRIT), spec(11, 9)]
    *before, bad, after = requests = submit(engine, *INNOCENT, culprit, [spec(12)])
    step_until_done(engine, requests)
    stage = "decode" if where == "decode" else "step"
    expected = f"a {stage} failed (RuntimeError); the server's log says where"
    assert failure(bad) == (stage, expected)
    check_undisturbed(engine, [*before, after])
    assert engine.load().max_rows == max_batch


def test_the_loop_goes_on_after_a_fault(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    fail_culprit(engine, monkeypatch, "step", RuntimeError("no such kernel"))
    engine.start()
    bad, good = submit(engine, [spec(CULPRIT)], [spec(1)])
    assert failure(bad)[0] == "step"
    assert len(images(good)) == 1
    assert len(images(engine.submit([spec(2)], "later"))) == 1
    assert engine.failure is None


def too_large() -> None:
    torch.empty(2**50)


def raise_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def bound(monkeypatch: pytest.MonkeyPatch, rows: Replayed, largest: int) -> list[int]:
    """Let more rows than that not fit into the memory; the numbers that were tried."""
    function, tried = rows._function, list[int]()

    def run(size: int) -> torch.Tensor:
        tried.append(size)
        if size > largest:
            too_large()
        return function(size)

    monkeypatch.setattr(rows, "_function", run)
    return tried


@pytest.mark.parametrize("graphs", [False, True], ids=["any rows", "buckets"])
def test_steps_shrink_until_they_fit(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    graphs: bool,
) -> None:
    engine = make_engine(24)
    if graphs:
        engine._runner.buckets = Buckets.upto(24)
    requests = submit(engine, *([spec(seed, 5 + seed % 3)] for seed in range(12)))
    engine.step()
    tried = bound(monkeypatch, engine._runner.model.rows, 7)
    engine.step()
    assert tried[0] == 24
    tried.clear()
    step_until_done(engine, requests)
    largest = 4 if graphs else 6
    assert (engine.load().max_rows, max(tried)) == (largest, largest), "no more is tried again"
    assert f"from now on a step has at most {largest} rows" in caplog.messages
    check_undisturbed(engine, requests)


@pytest.mark.parametrize("graphs", [False, True], ids=["any number", "buckets"])
def test_decodings_shrink_until_they_fit(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    graphs: bool,
) -> None:
    engine = make_engine(32)
    if graphs:
        engine._runner.decoder.buckets = Buckets.upto(16)
    tried = bound(monkeypatch, engine._runner.decoder.rows, 3)
    requests = submit(engine, *([spec(seed)] for seed in range(12)))
    step_until_done(engine, requests)
    again = submit(engine, *([spec(seed)] for seed in range(20, 32)))
    count = len(tried)
    step_until_done(engine, again)
    largest = 2 if graphs else 3
    assert tried[0] == (16 if graphs else 12)
    assert set(tried[count:]) == {largest}, "no more is tried again"
    assert f"from now on at most {largest} images are decoded at a time" in caplog.messages
    assert engine.load().max_rows == 32
    check_undisturbed(engine, [*requests, *again])


@pytest.mark.parametrize("part", ["model", "decoder"])
@pytest.mark.parametrize("fail", [too_large, raise_cuda])
def test_who_does_not_fit_alone_is_told(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, part: str, fail: Callable[[], None]
) -> None:
    engine = make_engine()
    with monkeypatch.context() as patch:
        patch.setattr(getattr(engine._runner, part).rows, "_function", lambda _: fail())
        requests = submit(engine, *INNOCENT)
        step_until_done(engine, requests)
    stage = "step" if part == "model" else "decode"
    for request in requests:
        expected = f"a {stage} did not fit into the memory"
        assert failure(request) == ("out_of_memory", expected)
    later = submit(engine, *INNOCENT)
    step_until_done(engine, later)
    check_undisturbed(engine, later)


def test_noise_that_does_not_fit_for_once_is_drawn_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    copy, faults = engine._runner.model.keep, [too_large]

    def keep(keys: Iterator[tuple[int, float]]) -> None:
        if faults:
            faults.pop()()
        copy(keys)

    monkeypatch.setattr(engine._runner.model, "keep", keep)
    requests = submit(engine, *INNOCENT)
    step_until_done(engine, requests)
    assert not faults
    check_undisturbed(engine, requests)


def test_what_a_failed_step_had_computed_is_let_go_before_memory_is_freed(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    computed: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def run(rows: int) -> None:
        velocity = torch.zeros(rows)
        computed.append(weakref.ref(velocity))
        too_large()

    monkeypatch.setattr(engine._runner.model.rows, "_function", run)
    monkeypatch.setattr(engine._runner, "free", lambda: alive.append(computed[-1]() is not None))
    step_until_done(engine, submit(engine, [spec(1), spec(2)]))
    assert alive == [False] * 3  # together, alone, and alone once more


def test_a_device_that_is_lost_while_pixels_arrive_is_given_up(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    engine._receiver = ThreadPoolExecutor(1)
    engine.start()

    class Lost:
        def images(self) -> None:
            raise RuntimeError("an illegal memory access")

    images(engine.submit([spec(1)], "first"))
    monkeypatch.setattr(engine._runner, "decode", lambda _: Lost())
    monkeypatch.setattr(engine._runner, "works", lambda: False)
    engine.submit([spec(2)], "second")
    engine._thread.join(TIMEOUT_S)
    assert engine.failure == "the engine failed (RuntimeError)"


def test_a_request_says_once_that_it_starts_and_before_it_does(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_batch=1)
    start, said = engine._runner.start, list[object]()

    def noted(slot: int, one: ImageSpec) -> None:
        said.append(one.seed)
        start(slot, one)

    monkeypatch.setattr(engine._runner, "start", noted)
    specs = [spec(1, 3), spec(2, 3)]
    large = engine.submit(specs, "", on_start=lambda: said.append(threading.current_thread()))
    small = engine.submit([spec(3, 3)], "", on_start=lambda: said.append("small"))
    gone = engine.submit([spec(4, 2)], "", on_start=lambda: said.append("gone"))
    engine.cancel(gone)
    engine.step()
    assert said == ["small", 3]
    step_until_done(engine, [large, small])
    assert said == ["small", 3, threading.current_thread(), 1, 2]


@pytest.mark.parametrize("stage", ["step", "decode", "receive"])
def test_how_long_something_takes_is_told_while_it_does(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    engine = make_engine()
    engine._image_s = 0.125
    if stage == "receive":
        engine._receiver = ThreadPoolExecutor(1)
    times: list[tuple[float, float]] = []
    watched, target = {
        "step": (engine._runner, "step"),
        "decode": (engine._runner, "decode"),
        "receive": (engine._runner, "decode"),
    }[stage]
    original = getattr(watched, target)
    expected = 1.0 if stage == "step" else 0.125

    def look() -> None:
        seen = threading.Thread(target=lambda: times.append(engine.activity()))
        seen.start()
        seen.join()

    def held(argument: object) -> object:
        result = original(argument)
        if stage == "receive":
            arrive = result.images
            result.images = lambda: (look(), arrive())[1]
        else:
            look()
        return result

    monkeypatch.setattr(watched, target, held)
    request = engine.submit([spec(2, 2)], "held")
    engine.step()
    assert len(images(request)) == 1
    engine.close()
    ((seconds, expected_s),) = times
    assert 0 < seconds < TIMEOUT_S and expected_s == expected
    assert engine.activity() == (0.0, 0.0)


def test_a_warm_up_is_no_activity(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    function, seen = engine._runner.decoder.rows._function, list[tuple[float, float]]()

    def run(rows: int) -> torch.Tensor:
        seen.append(engine.activity())
        return function(rows)

    monkeypatch.setattr(engine._runner.decoder.rows, "_function", run)
    engine.start()
    images(engine.submit([spec(1)], "after"))
    assert seen[0] == (0.0, 0.0)
