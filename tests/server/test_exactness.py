"""Whatever runs beside an image, whenever others come, go or run out of time: its bytes are those
of `denoise()` alone, no row is evaluated in vain, and no slot is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rae.models.checkpoint import Checkpoint, load_checkpoint
from rae.models.config import GuidanceMethod
from rae.models.guidance import Guidance
from rae.models.sampling import denoise, draw_noise, timesteps, to_uint8
from rae.server.devices import prepare
from rae.server.engine import Engine
from rae.server.errors import DeadlineError
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec, Request
from rae.server.settings import EngineSettings

CPU = torch.device("cpu")
MAX_ROWS = 6
METHODS: st.SearchStrategy[GuidanceMethod] = st.sampled_from(("cfg", "autoguidance"))
INTERVALS: st.SearchStrategy[tuple[float, float]] = st.sampled_from(
    ((0.0, 1.0), (0.3, 0.9), (0.0, 0.0))
)


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Solo:
    """The reference: one image, and how many rows of the model and the guide it took."""

    image: np.ndarray
    rows: list[int] = field(default_factory=lambda: [0, 0])


@dataclass(frozen=True)
class Arrival:
    """A request that comes after `gap` steps, and may be cancelled some steps later."""

    gap: int
    first: ImageSpec
    n: int
    client: str
    weight: float
    priority: Any
    deadline_s: float
    cancelled_after: int | None

    def specs(self) -> list[ImageSpec]:
        return [replace(self.first, seed=self.first.seed + i) for i in range(self.n)]


@st.composite
def specs(draw: st.DrawFn) -> ImageSpec:
    return ImageSpec(
        class_label=draw(st.integers(0, 4)),
        seed=draw(st.integers(0, 3) | st.integers(2**32, 2**32 + 3)),
        steps=draw(st.integers(2, 9)),
        cfg=draw(st.sampled_from((1.0, 1.5, 4.0))),
        guidance_method=draw(METHODS),
        guidance_interval=draw(INTERVALS),
    )


arrivals = st.builds(
    Arrival,
    gap=st.integers(0, 4),
    first=specs(),
    n=st.integers(1, 4),
    client=st.sampled_from(["a", "b"]),
    weight=st.sampled_from([1.0, 3.0]),
    priority=st.sampled_from(["low", "normal", "high"]),
    deadline_s=st.just(float("inf")) | st.floats(0.5, 30),
    cancelled_after=st.none() | st.integers(0, 9),
)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Checkpoint:
    checkpoint = load_checkpoint(tiny_checkpoint)
    for model in (checkpoint.dit_dh, checkpoint.guide, checkpoint.rae):
        assert model is not None
        prepare(model, CPU, torch.float32)
    return checkpoint


@pytest.fixture(scope="module")
def solo(reference: Checkpoint) -> Any:  # noqa: ANN401 - a cached function
    config = reference.config

    @cache
    def run(spec: ImageSpec) -> Solo:
        found = Solo(np.empty(0))

        def counted(which: int) -> Any:  # noqa: ANN401
            model = (reference.dit_dh, reference.guide)[which]
            assert model is not None

            def evaluate(latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
                found.rows[which] += len(latents)
                return model(latents, t, labels)

            return evaluate

        # With the null label both of CFG's branches would be the same.
        is_null = spec.class_label == 4 and spec.guidance_method == "cfg"
        with torch.inference_mode():
            latents = denoise(
                counted(0),
                draw_noise(config.dit_dh.latent_shape, [spec.seed]),
                torch.tensor([spec.class_label]),
                timesteps(spec.steps, config.shift),
                guidance=Guidance(
                    1.0 if is_null else spec.cfg, spec.guidance_interval, spec.guidance_method
                ),
                null_label=4,
                guide=counted(1),
            )
            found.image = to_uint8(reference.rae.decode(latents))[0].permute(1, 2, 0).numpy()
        return found

    return run


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Engine]:
    """Never started: the test steps it. Few rows a step, so that images take turns."""
    chosen = EngineSettings(
        model=tiny_checkpoint, device="cpu", precision="fp32", max_batch=MAX_ROWS
    )
    engine = Engine(load_checkpoint(tiny_checkpoint), chosen, Metrics())
    yield engine
    engine.close()


class Counter:
    """Counts the rows that one of the runner's models evaluates."""

    def __init__(self, evaluation: Any) -> None:  # noqa: ANN401
        self.evaluation, self.inner, self.rows = evaluation, evaluation.rows, 0
        evaluation.rows = self

    def __call__(self, rows: int) -> Tensor:
        assert rows <= MAX_ROWS
        self.rows += rows
        return self.inner(rows)

    def undo(self) -> int:
        self.evaluation.rows = self.inner
        return self.rows


def play(engine: Engine, script: list[Arrival]) -> list[Request]:
    """Let requests come and go while the engine steps, a second each, until nothing is left."""
    clock, requests, step = Clock(), [], 0
    cancels: list[tuple[int, Request]] = []
    todo, next_at = list(script), script[0].gap
    with patch("rae.server.engine.time", clock):
        while todo or engine._scheduler.has_work:
            while todo and next_at <= step:
                arrival = todo.pop(0)
                request = engine.submit(
                    arrival.specs(),
                    "played",
                    client=arrival.client,
                    weight=arrival.weight,
                    priority=arrival.priority,
                    deadline_s=arrival.deadline_s,
                )
                requests.append(request)
                if arrival.cancelled_after is not None:
                    cancels.append((step + arrival.cancelled_after, request))
                next_at = step + (todo[0].gap if todo else 0)
            for at, request in cancels:
                if at == step:
                    engine.cancel(request)
            engine.step()
            step, clock.now = step + 1, clock.now + 1
            assert step < 5000, "somebody never ends"
    return requests


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(script=st.lists(arrivals, min_size=1, max_size=8))
def test_every_image_is_that_of_denoise_alone(engine: Engine, solo: Any, script: Any) -> None:  # noqa: ANN401
    counters = [Counter(engine._runner.model), Counter(engine._runner.guide)]
    try:
        requests = play(engine, script)
    finally:
        evaluated = [counter.undo() for counter in counters]
    ended_early = False
    expected = [0, 0]
    for arrival, request in zip(script, requests, strict=True):
        alone = [solo(spec) for spec in arrival.specs()]
        if request.future.cancelled():
            assert arrival.cancelled_after is not None
            ended_early = True
        elif isinstance(request.future.exception(0), DeadlineError):
            assert arrival.deadline_s < float("inf")
            ended_early = True
        else:
            for image, one in zip(request.future.result(0).images, alone, strict=True):
                np.testing.assert_array_equal(image, one.image)
        for which in (0, 1):
            expected[which] += sum(one.rows[which] for one in alone)
    if ended_early:
        assert evaluated[0] <= expected[0] and evaluated[1] <= expected[1]
    else:
        assert evaluated == expected
    assert engine._scheduler.cost == 0 and not engine._scheduler.requests
    assert len(engine._scheduler._free) == engine.num_slots
