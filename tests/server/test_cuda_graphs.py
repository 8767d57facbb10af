"""On a GPU: graphs, streams and the host that runs ahead change no bit of what eager calls give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rae.models.checkpoint import load_checkpoint
from rae.server.engine import Engine
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import EngineSettings, Precision
from rae.server.warm_up import warm_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SPECS = [
    ImageSpec(
        class_label=i % 5,
        seed=i,
        steps=3 + i % 7,
        cfg=(1.0, 1.5, 4.0)[i % 3],
        guidance_method=("cfg", "autoguidance")[i % 2],
        guidance_interval=((0.0, 1.0), (0.3, 0.9))[i // 2 % 2],
    )
    for i in range(24)
]


def images(runner: Runner, specs: list[ImageSpec]) -> list[np.ndarray]:
    """All of them together, each leaving the steps when it is done."""
    for slot, spec in enumerate(specs):
        runner.start(slot, spec)
    for step in range(max(spec.num_evaluations for spec in specs)):
        runner.step([(i, step) for i, spec in enumerate(specs) if step < spec.num_evaluations])
    return runner.decode(range(len(specs))).images()


def make_runner(folder: Path, precision: Precision, *, graphs: bool) -> Runner:
    options = RunnerOptions(
        max_rows=48, slots=24, precision=precision, compile="off", graphs=graphs
    )
    return Runner(load_checkpoint(folder), torch.device("cuda"), options)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_graphs_give_the_bits_of_eager_calls(tiny_checkpoint: Path, precision: Precision) -> None:
    captured = make_runner(tiny_checkpoint, precision, graphs=True)
    warm_up(captured, lambda _: None)
    eager = make_runner(tiny_checkpoint, precision, graphs=False)
    eager.buckets, eager.decoder.buckets = captured.buckets, captured.decoder.buckets
    for first, second in zip(images(captured, SPECS), images(eager, SPECS), strict=True):
        np.testing.assert_array_equal(first, second)


def test_images_are_those_of_a_cpu(tiny_checkpoint: Path) -> None:
    on_gpu = images(make_runner(tiny_checkpoint, "fp32", graphs=True), SPECS)
    options = RunnerOptions(max_rows=48, slots=24, precision="fp32")
    cpu = Runner(load_checkpoint(tiny_checkpoint), torch.device("cpu"), options)
    for first, second in zip(on_gpu, images(cpu, SPECS), strict=True):
        difference = np.abs(first.astype(int) - second)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("max_batch", [8, 16], ids=["guide beside the model", "guide first"])
@pytest.mark.parametrize("compile", ["off", "on"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_neighbours_change_no_bit_when_deterministic(
    tiny_checkpoint: Path, precision: Precision, compile: str, max_batch: int
) -> None:
    """Images end at different steps, so that some are decoded while others are in a step."""
    settings = EngineSettings(
        device="cuda",
        precision=precision,
        compile=compile,  # type: ignore[arg-type]
        max_batch=max_batch,
        deterministic=True,
    )
    engine = Engine(load_checkpoint(tiny_checkpoint), settings, Metrics())
    engine.start()
    try:
        # The first waits for the warm-up, which compiles.
        alone = [engine.submit([s], "alone").future.result(200).images[0] for s in SPECS]
        together = [engine.submit([s], "together") for s in 5 * SPECS]
        for image, request in zip(5 * alone, together, strict=True):
            np.testing.assert_array_equal(image, request.future.result(60).images[0])
    finally:
        engine.close()
