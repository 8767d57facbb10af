"""What `rae train decoder`, `rae train dit` and `rae train assemble` do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import typer
from safetensors import SafetensorError

from rae.models.checkpoint import DECODER_FILE, load_autoencoder, load_rae
from rae.models.checkpoint_config import AutoencoderConfig, SamplerDefaults, read_any_config
from rae.models.config import DiTDHConfig
from rae.models.decoder import Decoder
from rae.models.encoder import load_encoder
from rae.models.published import NORMALISATION
from rae.models.rae import RAE
from rae.models.tensor_files import file_sha256
from rae.training.assemble import assemble_autoencoder, assemble_checkpoint
from rae.training.claim import CHECKPOINT, claimed, read_claim
from rae.training.data.image_data import ImageSource, fingerprint, open_dataset
from rae.training.data.image_encoder import read_encoder_config
from rae.training.data.latent_shards import LatentShards
from rae.training.data.samples import ImageSamples, Samples
from rae.training.data.stats import read_statistics
from rae.training.data.transforms import CenterCrop, RandomCrop
from rae.training.distributed import World, joined
from rae.training.planning.flops import model_flops
from rae.training.planning.gpus import world_peak_flops
from rae.training.recipe import Recipe
from rae.training.reports.report import RunReport, Silent
from rae.training.reports.trackers import TensorBoard, Tracker, WeightsAndBiases
from rae.training.run_settings import AssembleSettings, DecoderSettings, DiTSettings, RunSettings
from rae.training.stage1.build_decoder import LossFiles
from rae.training.stage1.decoder_recipe import DecoderRecipe
from rae.training.stage1.run_decoder import train_decoder
from rae.training.stage2.presets import DiTRecipe
from rae.training.stage2.run_dit import load_averages, require_fit, train_dit, trained

CLASS_NAMES = "class_names"
RUN = re.compile(r"(.+?)(?:@(\d+))?")


def run_decoder(settings: DecoderSettings, recipe: DecoderRecipe) -> None:
    with joined(settings.device) as world:
        source = open_dataset(settings.images)
        samples = ImageSamples(source, RandomCrop(recipe.model.image_size))
        rae, config = new_rae(recipe, settings)
        files = files_of(recipe, settings)
        facts = {"images": facts_of(source), "weights": hashes(settings.encoder, files)}
        with begun(settings, recipe, facts, world):
            with closing(report_of(settings, recipe, world)) as report:
                weights = train_decoder(recipe, samples, rae, settings, world, report, files)
            if world.is_first:
                rae.decoder = Decoder(recipe.model)  # the trained one may be sharded
                rae.decoder.load_state_dict(weights)
                out = settings.out / CHECKPOINT
                assemble_autoencoder(out, config, rae.cpu(), settings.encoder)
                typer.echo(f"Wrote {out}; next: rae train stats, then rae train dit")


def run_dit(settings: DiTSettings, recipe: DiTRecipe) -> None:
    with joined(settings.device) as world:
        config, rae = open_rae(settings.rae, settings.statistics, settings.images is not None)
        samples, facts = open_samples(settings, recipe)
        require_encoder_of(config, samples)
        require_fit(recipe, samples, rae)
        facts["rae"] = config.sha256[DECODER_FILE]
        facts[CLASS_NAMES] = list(samples.class_names)
        if settings.statistics is not None:
            facts["statistics"] = file_sha256(settings.statistics)
        with begun(settings, recipe, facts, world):
            with closing(report_of(settings, recipe, world)) as report:
                weights = train_dit(recipe, samples, rae, settings, world, report)
            if world.is_first and isinstance(recipe.model, DiTDHConfig):
                out = settings.out / CHECKPOINT
                assemble_checkpoint(
                    out,
                    config,
                    rae.cpu(),
                    recipe,
                    trained(recipe, weights),
                    classes=samples.class_names,
                    encoder=settings.rae / "encoder",
                    name=settings.out.resolve().name,
                )
                typer.echo(f"Wrote {out}; next: rae serve --model {out}")


def run_assemble(settings: AssembleSettings) -> None:
    out = settings.out
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: take a new folder")
    config, rae = open_rae(settings.rae, settings.statistics, with_encoder=False)
    run, step = run_of(settings.dit)
    recipe, model, step = load_averages(run, step)
    assemble_checkpoint(
        out,
        config,
        rae,
        recipe,
        model,
        classes=read_claim(run)["data"].get(CLASS_NAMES, ()),
        guide=load_averages(*run_of(settings.guide))[1] if settings.guide else None,
        defaults=SamplerDefaults(
            steps=settings.steps,
            cfg=settings.cfg,
            guidance_method=settings.guidance_method
            or ("autoguidance" if settings.guide else "cfg"),
        ),
        encoder=settings.rae / "encoder",
        name=settings.name or out.resolve().name,
    )
    typer.echo(f"Wrote {out}, of step {step:,}; next: rae serve --model {out}")


def run_of(text: str) -> tuple[Path, int | None]:
    """Of RUN or RUN@STEP. Raises ValueError for nothing."""
    match = RUN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not RUN or RUN@STEP")
    return Path(match[1]), int(match[2]) if match[2] else None


@contextmanager
def begun(
    settings: RunSettings, recipe: Recipe, facts: Mapping[str, Any], world: World
) -> Iterator[None]:
    """While the first process holds the run's folder; what it refuses, all refuse."""
    problem: ValueError | OSError | None = None
    with ExitStack() as stack:
        if world.is_first:
            try:
                stack.enter_context(claimed(settings.out, recipe, facts))
            except (ValueError, OSError) as error:
                problem = error
        if world.any(problem is not None):
            raise problem or ValueError("the first process refuses the folder")
        yield


def files_of(recipe: DecoderRecipe, settings: DecoderSettings) -> LossFiles:
    """Those that the recipe's losses look through."""
    return LossFiles(
        vgg=settings.vgg if recipe.perceptual == "lpips" else None,
        dino=settings.dino if recipe.discriminator == "dino" else None,
    )


def hashes(encoder: Path, files: LossFiles) -> dict[str, str]:
    """The sha256 of what a decoder learns through; what is absent is refused later."""
    named = {f"encoder/{path.name}": path for path in encoder.glob("*.safetensors")}
    named |= {name: path for name, path in files._asdict().items() if path is not None}
    return {name: file_sha256(path) for name, path in named.items() if path.is_file()}


def report_of(
    settings: RunSettings, recipe: DecoderRecipe | DiTRecipe, world: World
) -> RunReport | Silent:
    """MFU counts the trained model alone. Raises ImportError for a tracker that is not there."""
    if not world.is_first:
        return Silent()
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(TensorBoard(settings.out / "tensorboard"))
    if settings.wandb is not None:
        trackers.append(WeightsAndBiases(settings.out, settings.wandb, asdict(recipe)))
    return RunReport(
        settings.out,
        flops_per_image=model_flops(recipe.model).step,
        peak_flops=world_peak_flops(world, settings.precision),
        trackers=trackers,
    )


def facts_of(source: ImageSource) -> dict[str, Any]:
    return {"number": len(source), "sha256_of_names": fingerprint(source)}


def new_rae(recipe: DecoderRecipe, settings: DecoderSettings) -> tuple[RAE, AutoencoderConfig]:
    """With an untrained decoder, and latents as the encoder gives them. Raises ValueError."""
    folder = settings.encoder
    image_mean, image_std = NORMALISATION[recipe.encoder.kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        rae = RAE(recipe.model, image_mean=image_mean, image_std=image_std)
    read_encoder_config(folder)
    try:
        rae.encoder = load_encoder(recipe.encoder, folder)
    except SafetensorError as error:
        raise ValueError(f"{folder}: {error}") from error
    made = rae.encoder.latent_shape
    taken = (recipe.model.latent_channels, recipe.model.grid, recipe.model.grid)
    if made != taken:
        raise ValueError(f"{folder} makes latents {made}, the decoder takes {taken}")
    config = AutoencoderConfig(
        name=settings.out.resolve().name,
        decoder=recipe.model,
        encoder=replace(recipe.encoder, name=folder.resolve().name),
        image_mean=image_mean,
        image_std=image_std,
        source=f"trained by `rae train decoder {settings.preset}`",
        notes={"decoder_recipe": asdict(recipe)},
    )
    return rae, config


def open_rae(
    folder: Path, statistics: Path | None, with_encoder: bool
) -> tuple[AutoencoderConfig, RAE]:
    """Raises CheckpointError, ValueError."""
    if with_encoder:
        config, rae = load_autoencoder(folder)
    else:
        config, _ = read_any_config(folder)
        rae = load_rae(config, folder / DECODER_FILE)
    own = {field.name: getattr(config, field.name) for field in fields(AutoencoderConfig)}
    config = AutoencoderConfig(**own)  # of a folder that may hold a DiT^DH, too
    if statistics is not None:
        decoder = rae.decoder.config
        shape = (decoder.latent_channels, decoder.grid, decoder.grid)
        rae.latents_mean, rae.latents_var = read_statistics(statistics, shape)
    elif is_unmeasured(rae):
        raise ValueError(
            f"{folder} has no statistics of its latents: `rae train stats` makes them, and "
            "--statistics takes them"
        )
    return config, rae


def is_unmeasured(rae: RAE) -> bool:
    """As a decoder's training leaves it: nothing is subtracted, nothing divided by."""
    mean = rae.latents_mean
    return mean is not None and not mean.any() and bool((rae.latents_var == 1).all())


def require_encoder_of(config: AutoencoderConfig, samples: Samples) -> None:
    """Raises ValueError for latents that another encoder has made than the RAE's, as far as the
    folder knows its own."""
    if isinstance(samples, LatentShards):
        made = samples.index.encoder.get("sha256", {})
        for name, sha256 in made.items():
            own = config.sha256.get(f"encoder/{name}", sha256)
            if own != sha256:
                raise ValueError(f"{samples.folder}: its encoder's {name} is not the RAE's")


def open_samples(settings: DiTSettings, recipe: DiTRecipe) -> tuple[Samples, dict[str, Any]]:
    """What is trained on, and the facts that tell it from others."""
    if (settings.images is None) == (settings.latents is None):
        raise ValueError("one of --images and --latents is needed")
    if settings.latents is not None:
        shards = LatentShards(settings.latents)
        index = shards.index
        if (index.has_flips, index.image_size) != (recipe.horizontal_flip, recipe.image_size):
            raise ValueError(
                f"{settings.latents} has latents of {index.image_size} px, "
                f"{'with' if index.has_flips else 'without'} flips; the recipe says "
                f"{recipe.image_size} px, {'with' if recipe.horizontal_flip else 'without'}: "
                f"--set image_size={index.image_size} "
                f"--set horizontal_flip={str(index.has_flips).lower()}"
            )
        if settings.verify:
            for number in range(len(index.shards)):
                shards.verify(number)
        return shards, {"latents": shards.index.facts}
    assert settings.images is not None
    source = open_dataset(settings.images)
    crop = CenterCrop(recipe.image_size, flip=recipe.horizontal_flip)
    return ImageSamples(source, crop), {"images": facts_of(source)}
