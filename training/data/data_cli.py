"""`rae train stats` and `rae train encode`: what is done once for a data set and an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from rae.training.console import NOTHING_WRITTEN, Track, clear_errors, progress, require_new

if TYPE_CHECKING:
    from rae.training.data.image_encoder import ImageEncoder
    from rae.training.data.latent_stats import MeasuredLatents
    from rae.training.data.samples import ImageSamples
    from rae.training.distributed import World

Opened: TypeAlias = "tuple[ImageSamples, ImageEncoder, dict[str, Any]]"
IMAGES = "A folder of class folders or images, or .tar shards: a folder, a glob."
Encoder = Annotated[
    Path, typer.Option(help="A transformers folder, or a checkpoint folder with an encoder.")
]
Size = Annotated[
    int | None,
    typer.Option(help="Side of the images in pixels: 256, or what the checkpoint's have.", min=16),
]
BatchSize = Annotated[
    int, typer.Option("--batch", help="Images at a time, in each process.", min=1)
]
Workers = Annotated[
    int, typer.Option("--workers", help="Processes that read images, for each process.", min=0)
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of the .tar shards' index; default ~/.cache.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the encoder runs.")]


def encode(
    images: Annotated[str, typer.Option(help=IMAGES)],
    encoder: Encoder,
    out: Annotated[Path, typer.Option(help="Folder to write; what lies there is gone on with.")],
    size: Size = None,
    flips: Annotated[
        bool,
        typer.Option(help="Mirror images as well: stage 2 takes one or the other, by chance."),
    ] = True,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="How latents are stored: fp32 takes 0.8 MB for 768 × 16 × 16."),
    ] = "fp32",
    shard_size: Annotated[int, typer.Option(help="Images a file.", min=1)] = 512,
    batch_size: BatchSize = 64,
    num_workers: Workers = 8,
    device: Device = "auto",
    cache: Cache = None,
) -> None:
    """Encode a data set once, in fp32, so that stage 2 need not. Started again, it goes on."""
    with clear_errors():
        from rae.training.data.encode import encode_dataset
        from rae.training.data.latent_shards import LatentIndex
        from rae.training.distributed import joined
        from rae.training.precision import set_matmul_precision

        with joined(device) as world, progress(world.rank, world.size) as track:
            set_matmul_precision("fp32")
            samples, module, facts = opened(images, encoder, size, cache)
            index = LatentIndex(
                latent_shape=module.latent_shape,
                has_flips=flips,
                dtype=dtype,
                shard_size=shard_size,
                num_classes=samples.num_classes,
                class_names=samples.class_names,
                **facts,
            )
            index = encode_dataset(
                samples,
                module.to(world.device),
                out,
                index,
                world,
                batch_size=batch_size,
                num_workers=num_workers,
                on_batch=track("encode", len(samples)),
            )
        if world.is_first:
            num_rows = sum(entry.num_rows for entry in index.shards)
            num_skipped = sum(entry.num_skipped for entry in index.shards)
            typer.echo(f"Wrote {out}: {num_rows} images{told(num_skipped)}.")


def stats(
    out: Annotated[Path, typer.Option(help="The safetensors file to write, a new one.")],
    images: Annotated[str | None, typer.Option(help=IMAGES)] = None,
    latents: Annotated[
        Path | None, typer.Option(help="What `rae train encode` has made of them, instead.")
    ] = None,
    encoder: Annotated[
        Path | None, typer.Option(help="As of `encode`; latents have theirs already.")
    ] = None,
    size: Size = None,
    flips: Annotated[
        bool, typer.Option(help="Of mirror images as well. Off: of the training set itself.")
    ] = False,
    batch_size: BatchSize = 64,
    num_workers: Workers = 8,
    device: Device = "auto",
    cache: Cache = None,
) -> None:
    """Exact mean and variance, in fp32, of the encoder's latents over a data set."""
    with clear_errors(NOTHING_WRITTEN):
        from rae.training.data.stats import write_statistics
        from rae.training.distributed import joined
        from rae.training.precision import set_matmul_precision

        require_new(out)
        if (images is None) == (latents is None):
            raise ValueError("either --images or --latents is needed")
        with joined(device) as world, progress(world.rank, world.size) as track:
            set_matmul_precision("fp32")
            if latents is not None:
                if encoder is not None or size is not None:
                    raise ValueError("--encoder, --size: latents were encoded with theirs")
                measured, facts = of_latents(latents, flips, batch_size, world, track)
            else:
                assert images is not None
                if encoder is None:
                    raise ValueError("--encoder is needed for --images")
                source = opened(images, encoder, size, cache)
                measured, facts = of_images(source, flips, batch_size, num_workers, world, track)
        if world.is_first:
            out.parent.mkdir(parents=True, exist_ok=True)
            facts = {**facts, "has_flips": flips, "num_skipped": measured.num_skipped}
            sha256 = write_statistics(out, measured.statistics, facts)
            num_latents = measured.statistics.count
            typer.echo(f"Wrote {out}: {num_latents} latents{told(measured.num_skipped)}.")
            typer.echo(f"sha256 {sha256}")


def of_latents(
    folder: Path, has_flips: bool, batch_size: int, world: World, track: Track
) -> tuple[MeasuredLatents, dict[str, Any]]:
    """And what tells them from others."""
    from rae.training.data.latent_shards import LatentShards
    from rae.training.data.latent_stats import measure_shards

    shards = LatentShards(folder)
    advance = track("stats", len(shards))
    measured = measure_shards(
        shards, world, has_flips=has_flips, batch_size=batch_size, on_batch=advance
    )
    return measured, shards.index.facts


def of_images(
    source: Opened,
    has_flips: bool,
    batch_size: int,
    num_workers: int,
    world: World,
    track: Track,
) -> tuple[MeasuredLatents, dict[str, Any]]:
    """As `of_latents`."""
    from rae.training.data.latent_stats import measure_images

    samples, module, facts = source
    measured = measure_images(
        samples,
        module.to(world.device),
        world,
        has_flips=has_flips,
        batch_size=batch_size,
        num_workers=num_workers,
        on_batch=track("stats", len(samples)),
    )
    return measured, facts


def opened(images: str, encoder: Path, size: int | None, cache: Path | None) -> Opened:
    """Images without random parts, the encoder, and what tells their latents from others."""
    from rae.training.data.image_data import fingerprint, open_dataset
    from rae.training.data.image_encoder import load_image_encoder
    from rae.training.data.samples import ImageSamples
    from rae.training.data.transforms import CenterCrop

    loaded = load_image_encoder(encoder, size)
    source = open_dataset(images, cache)
    facts = {
        "image_size": loaded.image_size,
        "num_images": len(source),
        "encoder": loaded.facts,
        "dataset": {"name": Path(images).resolve().name, "sha256_of_names": fingerprint(source)},
    }
    return ImageSamples(source, CenterCrop(loaded.image_size)), loaded.module, facts


def told(num_skipped: int) -> str:
    return f"; {num_skipped} could not be read" if num_skipped else ""
