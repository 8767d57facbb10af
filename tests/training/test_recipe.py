"""The published settings, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rae.models.config import CONFIGS
from rae.training.claim import claimed
from rae.training.lr_schedule import LRSchedule
from rae.training.recipe import IMAGENET_IMAGES
from rae.training.run import compile_blocks
from rae.training.stage2.presets import DIT_PRESETS, DiTRecipe
from rae.training.stage2.run_dit import build, read_recipe

XL = DIT_PRESETS["DiTDH-XL-256"]


def test_the_published_recipe() -> None:
    """facts: arXiv 2510.11690 and the authors' configs/stage2/training."""
    assert XL.model == CONFIGS["DiTDH-XL-256"]
    assert (XL.batch_size, XL.epochs, XL.constant_epochs) == (1024, 800, 40)
    assert (XL.lr, XL.final_lr, XL.betas, XL.weight_decay) == (2e-4, 2e-5, (0.9, 0.95), 0)
    assert (XL.clip_norm, XL.ema_decay, XL.ema_rises) == (1.0, 0.9995, False)
    assert XL.time_shift == pytest.approx(6.93, abs=0.005)
    assert XL.steps(1, IMAGENET_IMAGES) == 1251
    schedule = XL.lr_schedule(IMAGENET_IMAGES)
    factors = [schedule.factor(1251 * epoch) for epoch in (0, 39, 40, 420, 800, 900)]
    assert factors == pytest.approx([1, 1, 1, 0.55, 0.1, 0.1])
    assert schedule.factor(1251 * 40 + 1) < 1
    assert DIT_PRESETS["DiTDH-XL-512"].image_size == 512
    plain = DIT_PRESETS["DiT-XL-256"].model
    assert (plain.hidden_size, plain.depth) == (1152, 28)


def test_a_schedule_that_warms_up_and_falls_as_a_cosine() -> None:
    schedule = LRSchedule(total_steps=12, warmup_steps=4, final_factor=0.1, shape="cosine")
    factors = [schedule.factor(step) for step in (0, 1, 3, 4, 8, 12, 20)]
    assert factors == pytest.approx([0.25, 0.5, 1, 1, 0.55, 0.1, 0.1])


def test_fewer_images_than_a_batch_are_refused() -> None:
    with pytest.raises(
        ValueError, match="1023 images are less than one batch of 1024: --set batch_size"
    ):
        XL.lr_schedule(1023)


def claim(folder: Path, recipe: DiTRecipe, data: Mapping[str, Any]) -> None:
    with claimed(folder, recipe, data):
        pass


def test_a_folder_is_of_one_training_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "recipe.tmp").write_text("{")  # of one that was killed
    with claimed(tmp_path, DIT_PRESETS["digits"], {}):
        with pytest.raises(ValueError, match="another process trains in"):
            claim(tmp_path, DIT_PRESETS["digits"], {})
    claim(tmp_path, DIT_PRESETS["digits"], {})


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("digits", "snapshots/step-000000001"),
        ("DiT-S-256", "encoder/snapshots/step-000000001"),
        ("digits", "checkpoint"),
    ],
)
def test_a_folder_is_of_one_run(tmp_path: Path, name: str, saved: str) -> None:
    recipe = DIT_PRESETS[name]
    claim(tmp_path / "run", recipe, {"images": 1})
    (tmp_path / "run" / "snapshots" / "step-000000001.partial").mkdir(parents=True)
    claim(tmp_path / "run", recipe, {"images": 7})  # nothing was saved: it is another run now
    (tmp_path / "run" / saved).mkdir(parents=True)
    claim(tmp_path / "run", recipe, {"images": 7})
    assert read_recipe(tmp_path / "run") == recipe
    with pytest.raises(ValueError, match=r"holds another run \(recipe.seed: 1, not 0; data.images"):
        claim(tmp_path / "run", replace(recipe, seed=1), {"images": 8})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not empty, and holds no recipe.json"):
        claim(tmp_path, recipe, {})
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="holds no run"):
        read_recipe(tmp_path / "run")


def test_weights_follow_from_the_seed_and_leave_torchs_generator_alone() -> None:
    config = DIT_PRESETS["digits-guide"].model
    state = torch.get_rng_state()
    first, again, other = (build(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["s_embedder.proj.weight"], other["s_embedder.proj.weight"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_give_the_same_numbers() -> None:
    config = replace(DIT_PRESETS["digits-guide"].model, depth=1)
    model = build(config, 0)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    latents = torch.randn(2, *config.latent_shape)
    arguments = (latents, torch.rand(2), torch.tensor([1, 2]))
    expected = model(*arguments)
    compile_blocks(model)
    torch.testing.assert_close(model(*arguments), expected, rtol=1e-4, atol=1e-5)
