"""The commands of `rae` that are about checkpoint folders. Light, as server/cli.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rae.models.command_line import takes
from rae.server.command_settings import ConvertSettings, ReconstructSettings
from rae.server.settings import find_folder
from rae.server.terminal import fail

checkpoints = typer.Typer()


@checkpoints.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder.", show_default="the embedded digits")
    ] = None,
) -> None:
    """Show what a checkpoint folder holds; `rae verify` checks all of it."""
    from rich.console import Console

    from rae.server.inspection import report

    try:
        report(find_folder(checkpoint), Console())
    except (ValueError, OSError) as error:
        fail(str(error))


@checkpoints.command()
@takes(ConvertSettings)
def convert(settings: ConvertSettings) -> None:
    """Convert published files to a checkpoint folder: the authors' .pt, or diffusers'."""
    from rae.server.conversion import run

    try:
        run(settings, typer.echo)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    typer.echo(f"Wrote {settings.out}")


@checkpoints.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
) -> None:
    """Write a checkpoint folder as the authors' files: flat .pt, stat.pt and YAML."""
    from rae.models.export import export as write

    try:
        files = write(find_folder(checkpoint), out, typer.echo)
    except (ValueError, OSError) as error:
        fail(str(error))
    typer.echo(f"Wrote {', '.join(files)} to {out}")


@checkpoints.command()
def verify(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder.", show_default="the embedded digits")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the published implementation's numbers for this very checkpoint, as "
            "benchmarks/record_reference.py writes them: dit_dh.io.safetensors, "
            "decoder.io.safetensors. No other kind of folder is read."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture to reconstruct.", show_default="a drawn one"),
    ] = None,
) -> None:
    """Check a checkpoint's files, tensors, values, outputs and reconstruction; exit 1 if wrong."""
    from rich.console import Console
    from rich.text import Text

    from rae.models.verify import verify as verify_folder

    words = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}
    console = Console(soft_wrap=True, highlight=False)
    failures = 0
    try:
        folder = find_folder(checkpoint)
    except (ValueError, OSError) as error:
        fail(str(error))
    for check in verify_folder(folder, reference=reference, image=image):
        failures += check.passed is False
        console.print(Text.assemble(words[check.passed], f"  {check.name}: {check.detail}"))
    if failures:
        fail(f"{failures} {'check' if failures == 1 else 'checks'} failed")


@checkpoints.command()
@takes(ReconstructSettings)
def reconstruct(settings: ReconstructSettings) -> None:
    """Write each IMAGE beside what the autoencoder makes of it, and print the PSNR."""
    from rae.models.checkpoint import load_autoencoder
    from rae.models.reconstruct import psnr_db, read_picture, side_by_side
    from rae.models.reconstruct import reconstruct as reconstruct_picture

    try:
        files = settings.files()
        config, rae = load_autoencoder(settings.find_folder(), settings.encoder)
        for path, file in files.items():
            picture = read_picture(path, config.decoder.image_size)
            rebuilt = reconstruct_picture(rae, picture)
            file.parent.mkdir(parents=True, exist_ok=True)
            side_by_side(picture, rebuilt).save(file)
            typer.echo(f"{file} (PSNR {psnr_db(rebuilt, picture):.2f} dB)")
    except (ImportError, OSError, ValueError) as error:
        fail(str(error))
