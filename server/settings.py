"""Flags, environment variables and settings: each field below is all three.

A command of the `rae` tool takes the fields of one class as its parameters (`command_line.takes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from rae.models.cache import converted

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Compile = Literal["auto", "on", "off"]
Kernels = Literal["auto", "triton", "library", "reference"]
Attention = Literal["auto", "triton", "library", "cudnn", "flash", "flash-attn", "reference"]
ImageFormat = Literal["png", "jpeg", "webp"]

MODEL, ENGINE = "Model", "Engine"


def server_version() -> str:
    try:
        return version("rae-server")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint folder, or nyu-visionx/RAE-collections:PRESET, downloaded once.",
            envvar="RAE_MODEL",
            show_default="the embedded digits",
            rich_help_panel=MODEL,
        ),
    ] = None

    def find_folder(self, say: Callable[[str], None] = typer.echo) -> Path:
        """The checkpoint folder, as `find_folder` of this module."""
        return find_folder(self.model, say)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(FolderSettings):
    device: Annotated[
        Device,
        typer.Option(
            help="Where the model runs; auto takes the first of cuda, mps, cpu that is there.",
            envvar="RAE_DEVICE",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of matrix products; auto is bf16 where that is fast, else fp32; tf32 is cuda's.",
            envvar="RAE_PRECISION",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    kernels: Annotated[
        Kernels,
        typer.Option(
            help="What runs between matrix products; auto is decided by op and shape.",
            envvar="RAE_KERNELS",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    attention: Annotated[
        Attention,
        typer.Option(
            help="The same for attention alone; auto does as --kernels says.",
            envvar="RAE_ATTENTION",
            rich_help_panel=MODEL,
        ),
    ] = "auto"
    compile: Annotated[
        Compile,
        typer.Option(
            help="torch.compile: on for all layers, auto for those that gain on cuda. It is kept.",
            envvar="RAE_COMPILE",
            rich_help_panel=MODEL,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ModelSettings):
    max_batch: Annotated[
        int,
        typer.Option(
            help="Evaluations in one step; an image with CFG takes two. More images take turns.",
            envvar="RAE_MAX_BATCH",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 64
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Fill every step to --max-batch, so that no bit can depend on other requests.",
            envvar="RAE_DETERMINISTIC",
            rich_help_panel=ENGINE,
        ),
    ] = False
    conditioning_mb: Annotated[
        int | None,
        typer.Option(
            help="Memory for labels and times that come again, of each model; 0 keeps nothing.",
            envvar="RAE_CONDITIONING_MB",
            min=0,
            show_default="a 64th of what is free, at most 2048",
            rich_help_panel=ENGINE,
        ),
    ] = None
    max_queue: Annotated[
        float,
        typer.Option(
            help="Model evaluations that may wait or run; beyond, requests get 429.",
            envvar="RAE_MAX_QUEUE",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 150_000


def find_folder(model: Path | None, say: Callable[[str], None] = typer.echo) -> Path:
    """The checkpoint folder that `model` names, the embedded one for None; a published model is
    downloaded and converted the first time. Raises ValueError or OSError where it cannot be had."""
    if model is None:
        return embedded_model()
    there = model if model.exists() else converted(str(model))
    if there is not None:
        return there
    from rae.models.hub import local_folder  # with torch, which the HTTP process does without

    return local_folder(str(model), say)


def embedded_model() -> Path:
    from rae.models import digits

    assert digits.__file__
    return Path(digits.__file__).parent
