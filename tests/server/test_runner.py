"""Rows in one batch equal `denoise()` alone, bit for bit, on a CPU."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rae.models.checkpoint import Checkpoint, load_checkpoint
from rae.models.config import GuidanceMethod, Solver
from rae.models.cpu import can_pack
from rae.models.guidance import Guidance
from rae.models.sampling import denoise, draw_noise, timesteps, to_uint8
from rae.server.decoding import NonFiniteError
from rae.server.devices import prepare, resolve_device, resolve_precision
from rae.server.request import ImageSpec
from rae.server.runner import Runner, RunnerOptions
from rae.server.settings import Precision

CPU = torch.device("cpu")
METHODS: tuple[GuidanceMethod, ...] = ("cfg", "autoguidance")


def mixed_specs(count: int, steps: int, null_label: int) -> list[ImageSpec]:
    draw = random.Random(0)
    return [
        ImageSpec(
            class_label=draw.randint(0, null_label),
            seed=draw.randrange(2**53),
            steps=steps,
            cfg=draw.choice([1.0, 1.5, 4.0]),
            guidance_method=draw.choice(METHODS),
            guidance_interval=draw.choice([(0.0, 1.0), (0.3, 0.9)]),
        )
        for _ in range(count)
    ]


def make_runner(folder: Path, dtype: torch.dtype, slots: int) -> Runner:
    precision: Precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    options = RunnerOptions(max_rows=2 * slots, slots=slots, precision=precision)
    return Runner(load_checkpoint(folder), CPU, options)


def prepared(folder: Path, dtype: torch.dtype) -> Checkpoint:
    checkpoint = load_checkpoint(folder)
    for model in (checkpoint.dit_dh, checkpoint.guide, checkpoint.rae):
        assert model is not None
        prepare(model, CPU, dtype)
    return checkpoint


def solo(
    checkpoint: Checkpoint, spec: ImageSpec, dtype: torch.dtype, solver: Solver = "euler"
) -> np.ndarray:
    """The reference: one image, with nobody beside it."""
    config = checkpoint.config
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        latents = denoise(
            checkpoint.dit_dh,
            draw_noise(config.dit_dh.latent_shape, [spec.seed]),
            torch.tensor([spec.class_label]),
            timesteps(spec.steps, config.shift),
            solver=solver,
            guidance=Guidance(spec.cfg, spec.guidance_interval, spec.guidance_method),
            null_label=config.dit_dh.null_label,
            guide=checkpoint.guide,
        )
        return to_uint8(checkpoint.rae.decode(latents))[0].permute(1, 2, 0).numpy()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_batch_size_gives_the_bits_of_denoise(
    tiny_checkpoint: Path, dtype: torch.dtype
) -> None:
    checkpoint = prepared(tiny_checkpoint, dtype)
    runner = make_runner(tiny_checkpoint, dtype, slots=40)
    specs = mixed_specs(40, steps=4, null_label=4)
    expected = [solo(checkpoint, spec, dtype) for spec in specs]
    assert len({image.tobytes() for image in expected}) == 40
    for batch in range(1, 41):
        slots = random.Random(batch).sample(range(40), batch)
        for slot in slots:
            runner.start(slot, specs[slot])
        for step in range(3):
            runner.step([(slot, step) for slot in slots])
        for slot, image in zip(slots, runner.decode(slots).images(), strict=True):
            np.testing.assert_array_equal(image, expected[slot], f"slot {slot} of {batch}")


def test_rows_at_different_steps_do_not_meet(tiny_checkpoint: Path) -> None:
    checkpoint = prepared(tiny_checkpoint, torch.float32)
    runner = make_runner(tiny_checkpoint, torch.float32, slots=3)
    long, short = mixed_specs(2, steps=9, null_label=4)
    short = ImageSpec(class_label=1, seed=5, steps=3, cfg=2.0)
    runner.start(2, long)
    for step in range(4):
        runner.step([(2, step)])
    runner.start(0, short)
    for step in range(2):
        runner.step([(0, step), (2, 4 + step)])
    np.testing.assert_array_equal(
        runner.decode([0]).images()[0], solo(checkpoint, short, torch.float32)
    )
    for step in range(6, 8):
        runner.step([(2, step)])
    np.testing.assert_array_equal(
        runner.decode([2]).images()[0], solo(checkpoint, long, torch.float32)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("solver", ["euler", "heun2", "midpoint"])
def test_solve_gives_the_bits_of_denoise(
    tiny_checkpoint: Path, dtype: torch.dtype, solver: Solver
) -> None:
    checkpoint = prepared(tiny_checkpoint, dtype)
    runner = make_runner(tiny_checkpoint, dtype, slots=3)
    specs = [ImageSpec(class_label=slot, seed=slot, steps=5, cfg=2.0) for slot in range(3)]
    for slot in (2, 0):
        runner.start(slot, specs[slot])
    runner.solve([2, 0], solver)
    for slot, image in zip((2, 0), runner.decode([2, 0]).images(), strict=True):
        np.testing.assert_array_equal(image, solo(checkpoint, specs[slot], dtype, solver))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named_on_request(tiny_checkpoint: Path, value: float) -> None:
    runner = make_runner(tiny_checkpoint, torch.float32, slots=4)
    runner.latents[2, 5, 0] = value
    runner.decode([0, 2]).images()
    with pytest.raises(NonFiniteError, match="slots 2 are not finite") as raised:
        runner.decode([3, 2, 1]).images(must_be_finite=True)
    assert raised.value.slots == [2]


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
def test_images_are_those_of_the_plain_model(
    packs: bool, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rae.server.devices.can_pack", lambda: packs and can_pack())
    runner = make_runner(tiny_checkpoint, torch.float32, slots=4)
    specs = mixed_specs(4, steps=9, null_label=4)
    for slot, spec in enumerate(specs):
        runner.start(slot, spec)
    for step in range(8):
        runner.step([(slot, step) for slot in range(4)])
    plain = load_checkpoint(tiny_checkpoint)
    for image, spec in zip(runner.decode(range(4)).images(), specs, strict=True):
        expected = solo(plain, spec, torch.float32)
        if packs:  # a rounding may turn a .5
            assert np.abs(image.astype(int) - expected).max() <= 1
            assert (image != expected).mean() < 0.01
        else:
            np.testing.assert_array_equal(image, expected)


def test_second_branches_are_planned_only_inside_the_interval(tiny_checkpoint: Path) -> None:
    runner = make_runner(tiny_checkpoint, torch.float32, slots=1)
    spec = ImageSpec(class_label=1, seed=0, steps=11, cfg=2.0, guidance_interval=(0.25, 0.75))
    plan = runner.plan(spec)
    times = timesteps(11, 1.5)[:-1].tolist()
    assert list(plan.guided) == [0.25 <= t <= 0.75 for t in times]
    assert plan.costs[0] == 10 + sum(plan.guided) and plan.costs[-1] == 0.0
    off = ImageSpec(class_label=1, seed=0, steps=11, cfg=1.0)
    null = ImageSpec(class_label=4, seed=0, steps=11, cfg=2.0)
    for unguided in (off, null):
        assert runner.plan(unguided).costs[0] == 10.0
    auto = ImageSpec(class_label=1, seed=0, steps=3, cfg=2.0, guidance_method="autoguidance")
    assert 2.0 < runner.plan(auto).costs[0] < 4.0, "the guide is smaller than the model"


def test_what_is_missing_is_refused_by_name() -> None:
    assert resolve_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available.*cpu"):
            resolve_device("cuda")
    with pytest.raises(ValueError, match="'tpu' is not one of auto, cuda, mps, cpu"):
        resolve_device("tpu")
    with pytest.raises(ValueError, match="'fp8' is not one of auto, fp32, tf32, bf16"):
        resolve_precision("fp8", CPU)
    assert resolve_precision("tf32", torch.device("cuda")) == ("tf32", torch.float32)
    with pytest.raises(ValueError, match="'tf32' takes a CUDA GPU, not 'cpu'"):
        resolve_precision("tf32", CPU)


def test_bf16_is_the_precision_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("rae.server.devices.can_pack", lambda fast=fast: fast)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
        assert resolve_precision("auto", CPU)[0] == name
    monkeypatch.setattr("rae.server.devices.can_pack", lambda: True)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", CPU)[0] == "fp32"
    assert resolve_precision("auto", torch.device("mps"))[0] == "fp32"
    assert resolve_precision("auto", torch.device("cuda"))[0] == "bf16"
