"""`--deterministic` on layers whose last bits depend on the number of rows, as a GPU's do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rae.models.checkpoint import load_checkpoint
from rae.server.engine import Engine
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import EngineSettings, Precision

SPECS = [
    ImageSpec(
        class_label=i % 4,
        seed=i,
        steps=4 + i % 5,
        cfg=(1.0, 2.0)[i % 2],
        guidance_method=("cfg", "autoguidance")[i // 2 % 2],
    )
    for i in range(12)
]


@pytest.fixture
def fickle_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain layers that sum in an order that the number of rows decides, as split-K kernels do."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        num_parts = x.numel() // x.shape[-1] % 3 + 1
        parts = zip(x.chunk(num_parts, -1), weight.chunk(num_parts, -1), strict=True)
        total = sum((F.linear(part, columns) for part, columns in parts), torch.zeros(()))
        return total if bias is None else total + bias

    monkeypatch.setattr("rae.server.devices.can_pack", lambda: False)
    monkeypatch.setattr("rae.models.layers.linear", linear)


def latents(folder: Path, precision: Precision, *, deterministic: bool) -> tuple[torch.Tensor, ...]:
    """The final latents of all images, each made alone and all made together."""
    options = RunnerOptions(max_rows=24, slots=12, precision=precision, deterministic=deterministic)
    runner = Runner(load_checkpoint(folder), torch.device("cpu"), options)

    def run(slots: list[int]) -> None:
        for slot in slots:
            runner.start(slot, SPECS[slot])
        for step in range(8):
            rows = [(slot, step) for slot in slots if step < SPECS[slot].num_evaluations]
            if rows:
                runner.step(rows)

    for slot in range(12):
        run([slot])
    alone = runner.latents.clone()
    run(list(range(12)))
    return alone, runner.latents


@pytest.mark.usefixtures("fickle_layers")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_bit_depends_on_neighbours(tiny_checkpoint: Path, precision: Precision) -> None:
    alone, together = latents(tiny_checkpoint, precision, deterministic=False)
    assert not torch.equal(alone, together), "these layers cannot show what the mode is for"
    alone, together = latents(tiny_checkpoint, precision, deterministic=True)
    assert torch.equal(alone, together)


@pytest.mark.usefixtures("fickle_layers")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_of_a_deterministic_engine(tiny_checkpoint: Path, precision: Precision) -> None:
    settings = EngineSettings(device="cpu", precision=precision, max_batch=16, deterministic=True)
    engine = Engine(load_checkpoint(tiny_checkpoint), settings, Metrics())
    engine.start()
    try:
        alone = [engine.submit([s], "alone").future.result(60).images[0] for s in SPECS]
        together = [engine.submit([s], "together") for s in SPECS]
        for image, request in zip(alone, together, strict=True):
            np.testing.assert_array_equal(image, request.future.result(60).images[0])
    finally:
        engine.close()
