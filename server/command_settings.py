"""The settings of the commands that do something once; `rae serve` has server/settings.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from rae.models.config import GuidanceMethod, Solver
from rae.server.settings import FolderSettings, ImageFormat, ModelSettings

Labels = Literal["balanced", "random"]
Pixels = Literal["truncate", "round"]

SOURCE = "What is converted"


@dataclass(frozen=True, kw_only=True)
class ClassesSettings(FolderSettings):
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="An id, a name or words of one; none for all."),
    ] = None
    imagenet: Annotated[
        bool, typer.Option("--imagenet", help="Of ImageNet's 1,000 classes; no checkpoint is read.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(ModelSettings):
    """What is None is the checkpoint's default; ranges are checked as for a request over HTTP."""

    cfg: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is off.", show_default="checkpoint's")
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(help="Grid points, 1 more than evaluations.", show_default="checkpoint's"),
    ] = None
    guidance_method: Annotated[
        GuidanceMethod | None,
        typer.Option(help="What guides.", show_default="checkpoint's"),
    ] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Closed interval of shifted time in which guidance is on.",
            show_default="checkpoint's",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SamplerSettings):
    classes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLASS", help="Class ids or names; none for an unconditional image."
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Image i of each class has seed + i.", show_default="random")
    ] = None
    n: Annotated[int, typer.Option("-n", "--n", help="Images of each class.", min=1)] = 1
    format: Annotated[ImageFormat, typer.Option(help="File format.")] = "png"
    out: Annotated[Path, typer.Option(help="Folder for the files.")] = Path(".")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write; new or empty.")]
    config: Annotated[
        Path | None,
        typer.Option(help="One of the authors' YAML files.", rich_help_panel=SOURCE),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            help="A published model: DiTDH-XL-256, DiTDH-XL-512, RAE-DINOv2-B-256, …",
            rich_help_panel=SOURCE,
        ),
    ] = None
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="A diffusers AutoencoderRAE folder, alone or in place of the preset's or "
            "the YAML file's RAE.",
            rich_help_panel=SOURCE,
        ),
    ] = None
    root: Annotated[
        Path | None,
        typer.Option(
            help="What the YAML file's paths are relative to, or where the hub's files lie.",
            show_default="the current folder",
            rich_help_panel=SOURCE,
        ),
    ] = None
    from_hub: Annotated[
        bool,
        typer.Option(
            "--from-hub", help="Download the preset's files first.", rich_help_panel=SOURCE
        ),
    ] = False
    dtype: Annotated[
        Literal["fp32", "bf16"],
        typer.Option(help="Of the matrix products' weights; all else is fp32."),
    ] = "fp32"
    classes: Annotated[
        Path | None,
        typer.Option(
            help="A text file of class names, one a line.",
            show_default="ImageNet's where there are 1,000",
        ),
    ] = None
    encoder: Annotated[
        Path | None, typer.Option(help="A transformers folder of the encoder to copy along.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplerSettings):
    """Exactly one of `per_class` and `num` is given."""

    out: Annotated[Path, typer.Option(help="The .npz; work in progress is in OUT.partial.")]
    per_class: Annotated[int | None, typer.Option(help="Images of each class.", min=1)] = None
    num: Annotated[int | None, typer.Option(help="Images of all classes.", min=1)] = None
    labels: Annotated[
        Labels, typer.Option(help="Image i has class i modulo their number, or a random one.")
    ] = "balanced"
    seed: Annotated[int, typer.Option(help="Image i has seed + i.")] = 0
    solver: Annotated[
        Solver, typer.Option(help="heun2 and midpoint evaluate twice per interval.")
    ] = "euler"
    pixels: Annotated[
        Pixels,
        typer.Option(help="To 8 bits: truncate as the published FID, or round as rae generate."),
    ] = "truncate"
    png: Annotated[
        Path | None, typer.Option(help="Folder for a PNG of each image too.", show_default="none")
    ] = None
    batch: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64
    rank: Annotated[
        int, typer.Option(help="Which of the processes this is.", envvar="RANK", min=0)
    ] = 0
    world_size: Annotated[
        int, typer.Option(help="Processes that share the work.", envvar="WORLD_SIZE", min=1)
    ] = 1
    local_rank: Annotated[
        int, typer.Option(help="Which GPU of this machine, of several.", envvar="LOCAL_RANK", min=0)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ReconstructSettings(FolderSettings):
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Pictures of any size.")]
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="The encoder's weights: a local transformers folder.",
            show_default="encoder/ of the checkpoint",
        ),
    ] = None
    out: Annotated[
        Path, typer.Option(help="A .png file for one IMAGE, or a folder for the files.")
    ] = Path(".")

    def files(self) -> dict[Path, Path]:
        """Where each image's picture goes. Raises ValueError where two would share a file."""
        if self.out.suffix.lower() == ".png" and len(self.images) == 1:
            return {self.images[0]: self.out}
        files = {path: self.out / f"{path.stem}-reconstruction.png" for path in self.images}
        if self.out.suffix.lower() == ".png" or len(set(files.values())) < len(self.images):
            raise ValueError(
                f"out {self.out} is not a folder in which {len(self.images)} images would have "
                "files of their own"
            )
        return files
