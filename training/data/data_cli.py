"""`rae train stats` and `rae train encode`: what is done once for a data set and an encoder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()

Data = Annotated[
    str, typer.Option(help="A folder of class folders or images, or .tar shards: a folder, a glob.")
]
Encoder = Annotated[
    Path, typer.Option(help="A transformers folder, or a checkpoint folder with an encoder.")
]
Size = Annotated[
    int | None,
    typer.Option(help="Side of the images in pixels: 256, or what the checkpoint's have.", min=16),
]
Flips = Annotated[bool, typer.Option(help="Each image mirrored as well.")]
BatchSize = Annotated[int, typer.Option(help="Images at a time, in each process.", min=1)]
Workers = Annotated[int, typer.Option(help="Processes that read images, for each process.", min=0)]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of the .tar shards' index; default ~/.cache.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the encoder runs.")]


def encode(
    data: Data,
    encoder: Encoder,
    out: Annotated[Path, typer.Option(help="Folder to write; what lies there is gone on with.")],
    size: Size = None,
    flips: Flips = True,
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
    """Encode a data set once, so that stage 2 need not. Started again, it goes on."""
    from rae.training.data.encode import encode_dataset
    from rae.training.data.image_encoder import load_image_encoder
    from rae.training.data.latent_shards import LatentIndex
    from rae.training.distributed import joined

    with failures_told("Stopped: the same command goes on."), joined(device) as world:
        loaded = load_image_encoder(encoder, size)
        samples, dataset = open_images(data, loaded.image_size, cache)
        index = LatentIndex(
            latent_shape=loaded.module.latent_shape,
            image_size=loaded.image_size,
            has_flips=flips,
            dtype=dtype,
            shard_size=shard_size,
            num_images=len(samples),
            num_classes=samples.num_classes,
            encoder=loaded.facts,
            dataset=dataset,
        )
        with progress("encode", len(samples), world.rank, world.size) as on_batch:
            index = encode_dataset(
                samples,
                loaded.module.to(world.device),
                out,
                index,
                world,
                batch_size=batch_size,
                num_workers=num_workers,
                on_batch=on_batch,
            )
        if world.is_first:
            num_rows = sum(entry.num_rows for entry in index.shards)
            num_skipped = sum(entry.num_skipped for entry in index.shards)
            message = f"Wrote {out}: {num_rows} images{told(num_skipped)}."
            console.print(message, soft_wrap=True, highlight=False)


def stats(
    data: Annotated[str, typer.Option(help="As of `encode`, or a folder that it wrote.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    encoder: Annotated[
        Path | None, typer.Option(help="As of `encode`; latents have theirs already.")
    ] = None,
    size: Size = None,
    flips: Flips = False,
    batch_size: BatchSize = 64,
    num_workers: Workers = 8,
    device: Device = "auto",
    cache: Cache = None,
) -> None:
    """Exact mean and variance of the encoder's latents over a data set."""
    from rae.training.data.image_encoder import load_image_encoder
    from rae.training.data.latent_shards import INDEX_FILE, LatentShards
    from rae.training.data.latent_stats import measure_images, measure_shards
    from rae.training.data.stats import write_statistics
    from rae.training.distributed import joined

    with failures_told("Stopped; nothing is written."), joined(device) as world:
        if (Path(data) / INDEX_FILE).is_file():
            refuse(encoder is not None or size is not None or flips, "--encoder, --size, --flips")
            shards = LatentShards(Path(data))
            with progress("stats", len(shards), world.rank, world.size) as on_batch:
                measured = measure_shards(shards, world, batch_size=batch_size, on_batch=on_batch)
            facts = shards.index.facts
        else:
            if encoder is None:
                raise ValueError(f"{data} holds images: --encoder is needed")
            loaded = load_image_encoder(encoder, size)
            samples, dataset = open_images(data, loaded.image_size, cache)
            with progress("stats", len(samples), world.rank, world.size) as on_batch:
                measured = measure_images(
                    samples,
                    loaded.module.to(world.device),
                    world,
                    has_flips=flips,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    on_batch=on_batch,
                )
            facts = {
                "image_size": loaded.image_size,
                "has_flips": flips,
                "num_images": len(samples),
                "encoder": loaded.facts,
                "dataset": dataset,
            }
        if world.is_first:
            out.parent.mkdir(parents=True, exist_ok=True)
            facts = {**facts, "num_skipped": measured.num_skipped}
            sha256 = write_statistics(out, measured.statistics, facts)
            num_latents = measured.statistics.count
            message = f"Wrote {out}: {num_latents} latents{told(measured.num_skipped)}."
            console.print(message, f"sha256 {sha256}", soft_wrap=True, highlight=False)


def open_images(data: str, size: int, cache: Path | None) -> tuple[Any, dict[str, Any]]:
    """Center-cropped images without random parts, and what tells their data set from others."""
    from rae.training.data.image_data import fingerprint, open_dataset
    from rae.training.data.samples import ImageSamples
    from rae.training.data.transforms import CenterCrop

    source = open_dataset(data, cache)
    facts = {"name": Path(data).resolve().name, "sha256_of_names": fingerprint(source)}
    return ImageSamples(source, CenterCrop(size)), facts


def refuse(is_given: bool, options: str) -> None:
    if is_given:
        raise ValueError(f"{options}: latents were encoded with theirs")


def told(num_skipped: int) -> str:
    return f"; {num_skipped} could not be read" if num_skipped else ""


@contextmanager
def progress(name: str, total: int, rank: int, size: int) -> Iterator[Callable[[int], None]]:
    """A bar of the first process; the others do as much meanwhile."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]} images/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=rank > 0) as bar:
        task = bar.add_task(name, total=total, speed="")

        def on_batch(num: int) -> None:
            bar.advance(task, num * size)
            speed = bar.tasks[0].speed
            bar.update(task, speed=f"{speed:.0f}" if speed else "")

        yield on_batch


@contextmanager
def failures_told(interrupted: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        Console(file=sys.stderr).print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(interrupted)
        raise typer.Exit(130) from None
