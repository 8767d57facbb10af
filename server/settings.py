"""Flags, environment variables and settings: each field below is all three.

A command of the `rae` tool takes the fields of one class as its parameters (`takes`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast, get_type_hints

import typer

from rae.models.config import GuidanceMethod, Solver

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp32", "bf16"]
ImageFormat = Literal["png", "jpeg", "webp"]
Labels = Literal["balanced", "random"]
Pixels = Literal["truncate", "round"]
LogLevel = Literal["debug", "info", "warning", "error"]

MODEL, ENGINE, HTTP, LIMITS = "Model", "Engine", "HTTP", "Limits of one request"
SOURCE = "What is converted"


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

    @property
    def folder(self) -> Path:
        """Raises ValueError for a published model that cannot be had."""
        if self.model is None:
            return embedded_model()
        if ":" not in self.model.name or self.model.exists():
            return self.model
        from rae.models.hub import local_folder

        return local_folder(str(self.model), typer.echo)


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
            help="Precision of the matrix products; auto is bf16 on cuda and fp32 elsewhere.",
            envvar="RAE_PRECISION",
            rich_help_panel=MODEL,
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class EngineSettings(ModelSettings):
    max_batch: Annotated[
        int,
        typer.Option(
            help="Images that are denoised together; more wait.",
            envvar="RAE_MAX_BATCH",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 64
    max_queue: Annotated[
        float,
        typer.Option(
            help="Model evaluations that may wait or run; beyond, requests get 429.",
            envvar="RAE_MAX_QUEUE",
            min=1,
            rich_help_panel=ENGINE,
        ),
    ] = 150_000


@dataclass(frozen=True, kw_only=True)
class ServeSettings(EngineSettings):
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; 0.0.0.0 lets other machines in.",
            envvar="RAE_HOST",
            rich_help_panel=HTTP,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            help="Port to listen on; 0 takes a free one.",
            envvar="RAE_PORT",
            min=0,
            max=65535,
            rich_help_panel=HTTP,
        ),
    ] = 8000
    root_path: Annotated[
        str,
        typer.Option(
            help="Prefix that a proxy puts before the paths and takes off, as /rae.",
            envvar="RAE_ROOT_PATH",
            rich_help_panel=HTTP,
        ),
    ] = ""
    cors_origins: Annotated[
        str,
        typer.Option(
            help="Origins whose pages may call, separated by commas; * for all.",
            envvar="RAE_CORS_ORIGINS",
            rich_help_panel=HTTP,
        ),
    ] = ""
    log_level: Annotated[
        LogLevel,
        typer.Option(
            help="Requests are logged at info.", envvar="RAE_LOG_LEVEL", rich_help_panel=HTTP
        ),
    ] = "info"
    max_steps: Annotated[
        int,
        typer.Option(help="Largest steps.", envvar="RAE_MAX_STEPS", min=2, rich_help_panel=LIMITS),
    ] = 1000
    max_images: Annotated[
        int,
        typer.Option(help="Largest n.", envvar="RAE_MAX_IMAGES", min=1, rich_help_panel=LIMITS),
    ] = 64
    max_body_bytes: Annotated[
        int,
        typer.Option(
            help="Largest body, in bytes.",
            envvar="RAE_MAX_BODY_BYTES",
            min=2,
            rich_help_panel=LIMITS,
        ),
    ] = 65_536

    @property
    def allowed_origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_origins.split(",") if origin.strip()]


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


def embedded_model() -> Path:
    from rae.models import digits

    assert digits.__file__
    return Path(digits.__file__).parent


def takes(settings: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Give a command that takes one `settings` object the object's fields as parameters."""
    make = cast("Callable[..., S]", settings)
    hints = get_type_hints(settings, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(settings)
    ]

    def decorate(function: Callable[[S], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            function(make(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        del command.__wrapped__
        return command

    return decorate
