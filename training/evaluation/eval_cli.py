"""The commands `rae eval samples`, `reconstruction` and `stats`; light until one of them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae.training.console import (
    NOTHING_WRITTEN,
    clear_errors,
    progress,
    require_folder_of,
    require_new,
)

if TYPE_CHECKING:
    import torch

    from rae.training.evaluation.feature_networks import FeatureNetwork
    from rae.training.evaluation.image_evaluation import EvaluationReport

Inception = Annotated[
    Path | None,
    typer.Option(
        help="FID's Inception-v3, as pytorch-fid and torch-fidelity publish it: "
        "pt_inception-2015-12-05-6726825d.pth."
    ),
]
EncoderFolder = Annotated[
    Path | None,
    typer.Option(
        "--encoder",
        help="Instead of Inception: a checkpoint folder, whose encoder is taken, or a transformers "
        "folder of DINOv2 with registers, SigLIP2 or MAE. Makes FDs, which are no FIDs.",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")]


def samples(
    images: Annotated[Path, typer.Argument(help="An .npz of `rae sample` or ADM, or a folder.")],
    reference: Annotated[
        Path,
        typer.Option(
            help="An .npz as ADM's, with images, statistics or both, or a folder of images, which "
            "are cropped to the samples' size."
        ),
    ],
    inception: Inception = None,
    encoder: EncoderFolder = None,
    device: Device = "auto",
    batch: Batch = 64,
    json_file: Json = None,
) -> None:
    """Hold generated images against real ones: FID, sFID, IS, precision and recall."""
    from rae.training.evaluation.image_evaluation import evaluate_samples
    from rae.training.evaluation.image_sources import open_images

    with clear_errors(NOTHING_WRITTEN):
        require_folder_of(json_file)
        with progress() as track:
            target = find_device(device)
            network = find_network(inception, encoder).to(target)
            report = evaluate_samples(
                open_images(images), reference, network, device=target, batch=batch, track=track
            )
        show(report, json_file, samples=str(images), reference=str(reference))


def reconstruction(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder, with its encoder.")],
    images: Annotated[
        Path, typer.Option(help="Folder of images, cropped to the model's size, or an .npz of it.")
    ],
    inception: Inception = None,
    encoder: EncoderFolder = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth."),
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Write a PNG of 16 images beside their reconstructions.")
    ] = None,
    device: Device = "auto",
    batch: Batch = 32,
    json_file: Json = None,
) -> None:
    """Put images through an autoencoder: PSNR, SSIM, LPIPS and rFID.

    Without --inception or --encoder the distance is on the checkpoint's own encoder.
    """
    from rae.models.checkpoint import load_autoencoder
    from rae.training.evaluation.feature_networks import checkpoint_encoder
    from rae.training.evaluation.image_evaluation import evaluate_reconstruction, pair_grid
    from rae.training.evaluation.image_sources import open_images
    from rae.training.stage1.perceptual import lpips_network

    with clear_errors(NOTHING_WRITTEN):
        for file in (json_file, grid):
            require_folder_of(file)
        with progress() as track:
            target = find_device(device)
            config, rae = load_autoencoder(checkpoint)
            if inception is None and encoder is None:
                network = checkpoint_encoder(checkpoint, config, rae)
            else:
                network = find_network(inception, encoder)
            result = evaluate_reconstruction(
                open_images(images, config.decoder.image_size),
                rae.to(target),
                network.to(target),
                lpips=lpips_network(lpips).to(target) if lpips else None,
                device=target,
                batch=batch,
                track=track,
            )
            if grid is not None:
                pair_grid(result.pairs).save(grid, format="PNG")
        show(result.report, json_file, checkpoint=str(checkpoint), data=str(images))


def stats(
    images: Annotated[Path, typer.Argument(help="A folder of images, or an .npz of them.")],
    out: Annotated[Path, typer.Option(help="A new .npz, as ADM's evaluator reads it.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Crop a folder's images to it, as ADM does.")
    ] = None,
    inception: Inception = None,
    encoder: EncoderFolder = None,
    device: Device = "auto",
    batch: Batch = 64,
) -> None:
    """Write a reference .npz: statistics of all images, and up to 10,000 of the images."""
    from rae.training.evaluation.image_sources import open_images
    from rae.training.evaluation.reference import write_reference

    with clear_errors(NOTHING_WRITTEN):
        require_folder_of(out)
        require_new(out)
        with progress() as track:
            target = find_device(device)
            network = find_network(inception, encoder).to(target)
            source = open_images(images, size)
            measured = write_reference(
                source, network, out, device=target, batch=batch, track=track
            )
        assert measured.features is not None
        typer.echo(
            f"Wrote {out}: statistics of {source.num:,} images by {network.name}, and "
            f"{len(measured.features):,} images"
        )


def find_network(inception: Path | None, encoder: Path | None) -> FeatureNetwork:
    """Raises ValueError unless one of the two is given."""
    from rae.training.evaluation.feature_networks import (
        INCEPTION_SOURCES,
        InceptionNetwork,
        load_encoder_network,
    )

    if inception is not None and encoder is not None:
        raise ValueError("--inception and --encoder are both given: figures are of one network")
    if inception is not None:
        return InceptionNetwork(inception)
    if encoder is not None:
        return load_encoder_network(encoder)
    raise ValueError(
        f"an FID wants --inception FILE, {INCEPTION_SOURCES}; without that file, --encoder "
        "FOLDER gives the Fréchet distance on an encoder's features"
    )


def find_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r}; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device {name}: this machine has {count} GPUs that torch can use")
    return device


def show(report: EvaluationReport, json_file: Path | None, **sources: str) -> None:
    """A table of the figures with what they were taken, and the same as JSON."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    table = Table("figure", "value")
    for name, value in report.figures.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    count = report.num_reference_images
    against = f" against {count:,}" if count is not None else ""
    console.print(f"{report.num_images:,} images{against}; network: {report.network}")
    for warning in report.warnings:
        console.print(f"Warning: {warning}", style="yellow", markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps({**sources, **report.to_dict()}, indent=1) + "\n")
