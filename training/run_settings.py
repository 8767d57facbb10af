"""How a run is carried out, beside the recipe that decides its weights. Each field is a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rae.training.overrides import suggestion
from rae.training.stage1.decoder_recipe import DECODER_PRESETS
from rae.training.stage2.presets import DIT_PRESETS

HOW, WRITTEN, DATA = "How it runs", "What is written", "What it learns from"

Precision = Literal["fp32", "tf32", "bf16"]
Strategy = Literal["ddp", "fsdp"]
DECODERS, DITS = tuple(DECODER_PRESETS), tuple(DIT_PRESETS)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What may differ between the parts of an interrupted run. A process does
    batch / (processes · micro_batch) micro-batches a step."""

    out: Annotated[
        Path, typer.Option(help="The run's folder; an interrupted run that lies there goes on.")
    ]
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where.", rich_help_panel=HOW)
    ] = "auto"
    precision: Annotated[
        Precision,
        typer.Option(
            help="Of matmuls; weights, gradients and moments are fp32.", rich_help_panel=HOW
        ),
    ] = "tf32"
    strategy: Annotated[
        Strategy,
        typer.Option(
            help="Several processes, by torchrun, have copies (ddp) or shards (fsdp).",
            rich_help_panel=HOW,
        ),
    ] = "ddp"
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples of a process at once, `rae train plan` says how many fit; the rest of "
            "its share is accumulated.",
            show_default="all",
            rich_help_panel=HOW,
        ),
    ] = None
    num_workers: Annotated[
        int,
        typer.Option("--workers", min=0, help="Processes that read data.", rich_help_panel=HOW),
    ] = 8
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile each block.", rich_help_panel=HOW)
    ] = False
    on_nonfinite: Annotated[
        Literal["stop", "skip"],
        typer.Option(
            help="After a loss that is no number; its batch is kept.", rich_help_panel=HOW
        ),
    ] = "stop"
    log_every: Annotated[
        int, typer.Option(min=1, help="Steps between figures.", rich_help_panel=WRITTEN)
    ] = 100
    sample_every: Annotated[
        int, typer.Option(min=1, help="Steps between grids of images.", rich_help_panel=WRITTEN)
    ] = 2500
    snapshot_every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps between snapshots, which a run goes on from.",
            rich_help_panel=WRITTEN,
        ),
    ] = 5000
    keep: Annotated[
        int, typer.Option(min=1, help="Snapshots that stay.", rich_help_panel=WRITTEN)
    ] = 2
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Also for TensorBoard.", rich_help_panel=WRITTEN),
    ] = False
    wandb: Annotated[
        str | None,
        typer.Option(metavar="PROJECT", help="Also for Weights & Biases.", rich_help_panel=WRITTEN),
    ] = None


def preset_argument(names: Sequence[str], help: str) -> Any:  # noqa: ANN401
    """That refuses a name which is none of `names`."""

    def known(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"unknown preset {name!r}; {suggestion(name, names)}")
        return name

    return typer.Argument(metavar="PRESET", help=help, callback=known)


Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe, as often as needed: `rae train plan PRESET --recipe` lists it.",
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        help="Of the latents, by `rae train stats`.",
        show_default="the RAE's own",
        rich_help_panel=DATA,
    ),
]


@dataclass(frozen=True, kw_only=True)
class DecoderSettings(RunSettings):
    preset: Annotated[str, preset_argument(DECODERS, f"The recipe: {', '.join(DECODERS)}.")]
    images: Annotated[
        Path, typer.Option(help="Images in folders, or .tar shards.", rich_help_panel=DATA)
    ]
    encoder: Annotated[
        Path,
        typer.Option(
            help="The frozen encoder, a transformers folder as published.", rich_help_panel=DATA
        ),
    ]
    vgg: Annotated[
        Path | None, typer.Option(help="Of LPIPS: vgg16-397923af.pth.", rich_help_panel=DATA)
    ] = None
    dino: Annotated[
        Path | None,
        typer.Option(
            help="Of the discriminator: dino_vit_small_patch8_224.pth.", rich_help_panel=DATA
        ),
    ] = None
    changes: Changes = None


@dataclass(frozen=True, kw_only=True)
class DiTSettings(RunSettings):
    preset: Annotated[str, preset_argument(DITS, f"The recipe: {', '.join(DITS)}.")]
    rae: Annotated[
        Path,
        typer.Option(
            help="Checkpoint folder of the RAE, with its encoder where images are given.",
            rich_help_panel=DATA,
        ),
    ]
    images: Annotated[
        Path | None,
        typer.Option(help="Images in a folder a class, or .tar shards.", rich_help_panel=DATA),
    ] = None
    latents: Annotated[
        Path | None,
        typer.Option(help="What `rae train encode` has made of them.", rich_help_panel=DATA),
    ] = None
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Check the latents' checksums first.", rich_help_panel=DATA),
    ] = False
    statistics: Statistics = None
    changes: Changes = None


@dataclass(frozen=True, kw_only=True)
class AssembleSettings:
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write.")]
    rae: Annotated[Path, typer.Option(help="Checkpoint folder of the RAE.")]
    dit: Annotated[
        str, typer.Option(metavar="RUN[@STEP]", help="A run's folder, and which snapshot.")
    ]
    guide: Annotated[
        str | None, typer.Option(metavar="RUN[@STEP]", help="An early, weaker one.")
    ] = None
    statistics: Statistics = None
    name: Annotated[str, typer.Option(help="What the checkpoint is called.")] = ""
    steps: Annotated[int, typer.Option(help="Default of requests.")] = 50
    cfg: Annotated[float, typer.Option(help="Default of requests.")] = 1.0
    guidance_method: Annotated[
        Literal["cfg", "autoguidance"] | None,
        typer.Option(
            help="Default of requests.", show_default="autoguidance with --guide, else cfg"
        ),
    ] = None
