"""The plan against sums done by hand, and what the command prints of it."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from rae.models.config import CONFIGS
from rae.training.cli import train_app
from rae.training.digits.digits_data import NUM_TRAIN
from rae.training.digits.pipeline import DigitsRecipe
from rae.training.overrides import override
from rae.training.planning.flops import (
    DINO,
    ENCODERS,
    discriminator_flops,
    encoder_flops,
    lpips_flops,
    model_flops,
)
from rae.training.planning.gpus import GPUS, Cluster, find_gpu, peak_flops
from rae.training.planning.plan import DIGITS_IMAGES, Plan, images_of
from rae.training.planning.plan_cli import PRESETS, plan_command
from rae.training.planning.plan_sheet import launcher
from rae.training.recipe import IMAGENET_IMAGES

H200 = Cluster(gpu_name="NVIDIA H200", gpu=GPUS["NVIDIA H200"], num_gpus=8)


def plan(preset: str, cluster: Cluster = H200, *, pre_encoded: bool = False) -> Plan:
    return Plan(recipe=PRESETS[preset], cluster=cluster, pre_encoded=pre_encoded)


def test_stage_2_as_published() -> None:
    published = plan("DiTDH-XL-256")
    assert (published.steps_per_epoch, published.num_steps) == (1251, 1_000_800)
    assert published.images_seen == 1_000_800 * 1024
    step = model_flops(published.recipe.model).step + encoder_flops(ENCODERS["dinov2"])
    assert published.flops == published.images_seen * step
    seconds = published.flops / (8 * 494.7e12 * 0.4)
    assert published.seconds == pytest.approx(seconds)
    assert published.gpu_hours == pytest.approx(8 * seconds / 3600)
    assert published.images_per_s == pytest.approx(published.images_seen / seconds)
    assert published.step_flops == pytest.approx(1024 * step)
    assert published.snapshot_bytes == 16 * published.num_parameters


def test_latents_save_the_encoder() -> None:
    with_encoder, without = plan("DiTDH-S-256"), plan("DiTDH-S-256", pre_encoded=True)
    encoder = encoder_flops(ENCODERS["dinov2"])
    assert with_encoder.flops - without.flops == without.images_seen * encoder
    assert without.frozen_bytes == 0 < with_encoder.frozen_bytes


def test_512_px_are_encoded_at_448() -> None:
    encoder = plan("DiTDH-XL-512").encoder
    assert encoder is not None
    assert (encoder.image_size, encoder.num_patches) == (448, 1024)


def test_a_decoder_costs_more_once_its_discriminator_learns_and_is_heard() -> None:
    published = plan("DINOv2-B-256")
    assert published.steps_per_epoch == 2502
    assert [phase.num_steps for phase in published.phases] == [6 * 2502, 2 * 2502, 8 * 2502]
    first, second, third = (phase.flops_per_image for phase in published.phases)
    model = model_flops(published.recipe.model)
    encoder, lpips = encoder_flops(ENCODERS["dinov2"]), lpips_flops(256).step
    update, adversarial = discriminator_flops(DINO, 5)
    assert first == model.step + encoder + lpips
    assert second - first == update.step + model.forward
    assert third - second == adversarial.step
    assert published.flops == 512 * 2502 * (6 * first + 2 * second + 8 * third)


def test_a_decoder_takes_a_step_at_least() -> None:
    published = plan("DINOv2-B-256")
    short = replace(published, recipe=replace(published.recipe, epochs=1e-5, warmup_epochs=0.0))
    assert [phase.num_steps for phase in short.phases] == [short.num_steps] == [1]


def test_a_decoder_that_is_judged_by_its_encoder_needs_no_other_network() -> None:
    published = plan("DINOv2-B-256")
    recipe = replace(published.recipe, perceptual="encoder", discriminator="none")
    alone = replace(published, recipe=recipe)
    encoder = encoder_flops(ENCODERS["dinov2"])
    expected = model_flops(recipe.model).step + 4 * encoder
    assert [phase.flops_per_image for phase in alone.phases] == [expected]
    assert alone.frozen_bytes < published.frozen_bytes
    assert alone.activation_bytes < published.activation_bytes


def test_the_largest_micro_batch_is_the_last_that_fits() -> None:
    small = replace(H200, gpu_name="4090", gpu=GPUS["NVIDIA GeForce RTX 4090"])
    found = replace(plan("DiTDH-B-256", small), micro_batch=None)
    largest = found.largest_micro_batch
    assert largest is not None and 1 < largest < found.images_per_gpu == 128
    assert found.fits(largest) and not found.fits(2 * largest)
    assert found.used_micro_batch * found.accumulation * 8 == 1024
    weights = 4 * found.num_parameters
    assert found.bytes_with(largest) == (
        6 * weights + found.frozen_bytes + largest * found.activation_bytes
    )


def test_fsdp_fits_where_ddp_does_not() -> None:
    small = replace(H200, gpu_name="4090", gpu=GPUS["NVIDIA GeForce RTX 4090"], num_gpus=16)
    assert plan("DiTDH-XL-256", small).largest_micro_batch == 1
    sharded = plan("DiTDH-XL-256", replace(small, strategy="fsdp")).largest_micro_batch
    assert sharded is not None and sharded > 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 100}, "100 images are less than one batch of 1024"),
        ({"cluster": replace(H200, num_gpus=7)}, "7 GPUs do not divide a batch of 1024"),
        ({"micro_batch": 48}, "a micro-batch of 48 does not divide a GPU's 128 images"),
        ({"recipe": PRESETS["MAE-B-256"], "pre_encoded": True}, "latents alone"),
    ],
)
def test_what_cannot_be_planned_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan("DiTDH-XL-256"), **changes)


def test_an_impossible_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="0 GPUs"):
        replace(H200, num_gpus=0)
    with pytest.raises(ValueError, match="MFU of 1.5"):
        replace(H200, mfu=1.5)


def test_gpus_are_found_by_the_words_of_their_names() -> None:
    assert find_gpu("h200")[0] == "NVIDIA H200"
    assert find_gpu("H100")[0] == "NVIDIA H100 80GB HBM3"
    assert find_gpu("A100 40GB")[0] == "NVIDIA A100-SXM4-40GB"
    with pytest.raises(ValueError, match="GPU 'TPU' is not known; known: NVIDIA B200"):
        find_gpu("TPU")
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("cpu", "bf16") is None


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(plan_command)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    return result.exit_code, result.output


def test_the_command_prints_the_plan_and_its_assumption() -> None:
    code, text = run("DiTDH-XL-256", "--mfu", "0.5", "--set", "epochs=80", "--precision", "bf16")
    assert code == 0
    lines = {name.strip(): value for name, value in (line.rsplit("  ", 1) for line in rows(text))}
    assert lines["steps of 80 epochs"].strip() == "100,080"
    assert lines["MFU, an assumption (--mfu)"].strip() == "50%"
    assert lines["trained parameters"].strip() == "838.4 M"
    assert "Fits: 8 GPUs × 128 images × 1 micro-batch = a batch of 1,024." in text


def rows(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if "  " in line.strip()]


def test_the_command_says_what_fits_instead() -> None:
    code, text = run("DiTDH-XL-256", "--gpu", "A100", "--micro-batch", "128")
    assert code == 1
    assert "Does not fit: 8 GPUs × 128 images × 1 micro-batch. A micro-batch of 32 does." in text
    assert "torchrun" not in text
    code, text = run("DiTDH-XL-256", "--gpu", "L4", "--gpus", "2")
    assert code == 1
    assert "Does not fit even with a micro-batch of 1. Try --strategy fsdp." in text
    code, text = run("DiTDH-XL-256", "--gpu", "L4", "--gpus", "1", "--set", "model.depth=60")
    assert code == 1 and "Does not fit even" in text and "fsdp" not in text


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (
            ("DiTDH-XL-256", "--gpu", "A100", "--set", "epochs=80", "--set", "betas=(0.5,0.9)"),
            "torchrun --nproc-per-node 8 -m rae.server train dit DiTDH-XL-256 --rae RAE "
            "--statistics STATISTICS --images IMAGES --out RUN --micro-batch 32 --precision tf32 "
            "--strategy ddp --set epochs=80 --set 'betas=(0.5,0.9)'",
        ),
        (
            ("digits", "--gpus", "1", "--latents", "--micro-batch", "64", "--precision", "bf16"),
            "rae train dit digits --rae RAE --statistics STATISTICS --latents LATENTS --out RUN "
            "--micro-batch 64 --precision bf16",
        ),
        (
            ("MAE-B-256", "--gpus", "16", "--strategy", "fsdp", "--set", "perceptual=none"),
            "torchrun --nproc-per-node 8 --nnodes 2 --rdzv-backend c10d "
            "--rdzv-endpoint HOST:PORT -m rae.server train decoder MAE-B-256 --images IMAGES "
            "--encoder ENCODER --dino DINO --out RUN --micro-batch 32 --precision tf32 "
            "--strategy fsdp --set perceptual=none",
        ),
    ],
)
def test_the_command_ends_with_what_runs_the_plan(arguments: tuple[str, ...], command: str) -> None:
    code, text = run(*arguments)
    assert code == 0 and text.splitlines()[-1] == command


def test_what_is_printed_can_be_typed() -> None:
    """The training command takes each of the flags and refuses only what the plan cannot know."""
    _, text = run("DiTDH-S-256", "--gpus", "1", "--set", "epochs=80")
    result = CliRunner().invoke(train_app, shlex.split(text.splitlines()[-1])[2:])
    assert result.exit_code == 2 and "RAE is not a checkpoint folder" in result.output


def test_twelve_gpus_are_on_three_machines() -> None:
    assert launcher(12)[:5] == ["torchrun", "--nproc-per-node", "4", "--nnodes", "3"]


def test_the_recipe_alone_is_printed_as_set_takes_it() -> None:
    code, text = run("DiTDH-XL-256", "--recipe", "--set", "model.depth=3")
    changed = replace(PRESETS["DiTDH-XL-256"], model=replace(CONFIGS["DiTDH-XL-256"], depth=3))
    assert code == 0 and "model.depth=3" in text.splitlines()
    assert override(PRESETS["DiTDH-S-512"], text.splitlines()) == changed


def test_digits_are_planned_for_as_many_images_as_are_made() -> None:
    assert NUM_TRAIN * (1 + DigitsRecipe().copies) == DIGITS_IMAGES
    assert images_of("digits-guide") == DIGITS_IMAGES
    assert images_of("MAE-B-256") == images_of("DiT-S-256") == IMAGENET_IMAGES
    _, text = run("digits", "--gpus", "1", "--micro-batch", "1")
    assert "steps an epoch of 25,500 images" in text
    assert "steps an epoch of 51,000 images" in run("digits", "--images", "51000")[1]
    assert "activations of 1 image," in text
    assert "Fits: 1 GPU × 1 image × 128 micro-batches = a batch of 128." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("DiTDH-XXL-256",), "did you mean DiTDH-XL-256?"),
        (
            ("DiTDH-XL-256", "--set", "epoch=3"),
            "--set epoch=3: the recipe has no 'epoch'",
        ),
        (("DiTDH-XL-256", "--gpu", "TPU"), "is not known"),
        (("DiTDH-XL-256", "--gpus", "3"), "do not divide"),
    ],
)
def test_the_command_refuses_with_a_hint(arguments: tuple[str, ...], message: str) -> None:
    code, text = run(*arguments)
    assert code == 2 and message in text
