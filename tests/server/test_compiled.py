"""Blocks as torch.compile makes them, in a CPU's buckets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from rae.models.checkpoint import load_checkpoint
from rae.server.engine import Engine
from rae.server.graphs import keep_compiled
from rae.server.metrics import Metrics
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import Compile, EngineSettings, Kernels
from rae.server.warm_up import warm_up

SPECS = [
    ImageSpec(
        class_label=slot,
        seed=slot,
        steps=4 + slot,
        cfg=1 + slot,
        guidance_method=("cfg", "autoguidance")[slot % 2],
    )
    for slot in range(3)
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def latents(folder: Path, compile: Compile, kernels: Kernels = "auto") -> torch.Tensor:
    options = RunnerOptions(max_rows=4, slots=3, precision="fp32", compile=compile, kernels=kernels)
    runner = Runner(load_checkpoint(folder), torch.device("cpu"), options)
    if compile == "on":
        assert runner.buckets.sizes == (1, 2, 4)
        warm_up(runner, lambda _: None)
    for slot, spec in enumerate(SPECS):
        runner.start(slot, spec)
    for step in range(5):
        runner.step([(i, step) for i, spec in enumerate(SPECS) if step < spec.num_evaluations])
    return runner.latents


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_blocks_of_a_kind_are_one_graph_per_bucket(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, kernels: Kernels
) -> None:
    """Traced only: what inductor makes of the graphs takes minutes, and is a slow test."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("rae.server.devices.can_pack", lambda: False)
    compiled = latents(tiny_checkpoint, "on", kernels)
    # A fused backbone begins and ends a stream: its two blocks here differ.
    per_bucket = {"auto": 2 + 2 + 1, "reference": 3 + 2 + 1}[kernels]
    assert counters["stats"]["unique_graphs"] == 3 * per_bucket
    assert torch.equal(compiled, latents(tiny_checkpoint, "off", kernels))


def test_the_engine_compiles_more_than_torch_allows_by_itself(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread of its own, where settings of the thread that made it may not hold."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    settings = EngineSettings(device="cpu", compile="on", max_batch=16)
    engine = Engine(load_checkpoint(tiny_checkpoint), settings, Metrics())
    engine.start()
    try:
        assert len(engine.submit(SPECS, "compiled").future.result(60).images) == 3
        assert counters["stats"]["unique_graphs"] > 5 * 2 * 2
    finally:
        engine.close()


@pytest.mark.parametrize("chosen", [None, "torch's own", "/chosen"])
def test_what_is_compiled_is_kept_where_nobody_chose_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    name, folder = "TORCHINDUCTOR_CACHE_DIR", tmp_path / "cache"
    monkeypatch.setenv(name, default_cache_dir() if chosen == "torch's own" else chosen or "")
    if chosen is None:
        monkeypatch.delenv(name)
    keep_compiled(folder)
    assert os.environ[name] == ("/chosen" if chosen == "/chosen" else str(folder))
    monkeypatch.setenv(name, default_cache_dir())
    (tmp_path / "a file").touch()
    keep_compiled(tmp_path / "a file" / "below")
    assert os.environ[name] == default_cache_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_images_are_the_same_and_a_second_start_finds_the_code(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch sets it
    first = latents(tiny_checkpoint, "on")
    made = counters["inductor"]["fxgraph_cache_miss"]
    assert made == 15 and not counters["inductor"]["fxgraph_cache_hit"]
    assert any((tmp_path / "rae-server" / "compiled").iterdir())
    torch.testing.assert_close(first, latents(tiny_checkpoint, "off"), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    counters.clear()
    assert torch.equal(latents(tiny_checkpoint, "on"), first)
    assert counters["inductor"]["fxgraph_cache_hit"] == made
    assert not counters["inductor"]["fxgraph_cache_miss"]
