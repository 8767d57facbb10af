"""How a run is carried out, beside the recipe that decides its weights; and its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from torch import nn

from rae.training.batch import Batch
from rae.training.distributed import Strategy, World
from rae.training.overrides import differences
from rae.training.precision import Precision
from rae.training.trainer import TrainerConfig

if TYPE_CHECKING:
    from rae.training.samples import Samples

RECIPE_FILE = "recipe.json"
HOW, WRITTEN = "How it runs", "What is written"


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
            help="Samples of a process at once; the rest of its share is accumulated.",
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

    def trainer(self, num_steps: int, milestones: Sequence[int] = ()) -> TrainerConfig:
        return TrainerConfig(
            num_steps=num_steps,
            log_every=self.log_every,
            sample_every=self.sample_every,
            snapshot_every=self.snapshot_every,
            keep=self.keep,
            milestones=frozenset(milestones),
            on_nonfinite=self.on_nonfinite,
        )


def step_batches(
    samples: Samples,
    settings: RunSettings,
    world: World,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
) -> Iterator[Sequence[Batch]]:
    """The micro-batches of each step of this process, from `start_step` on.

    Raises ValueError for a batch that the processes and the micro-batch do not divide.
    """
    from rae.training.stream import batches

    micro_batch = settings.micro_batch or max(1, batch_size // world.size)
    one_by_one = batches(
        samples,
        seed=seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        world=world,
        start_step=start_step,
        num_workers=settings.num_workers,
    )
    while True:
        yield list(islice(one_by_one, batch_size // (world.size * micro_batch)))


def compile_blocks(module: nn.Module) -> None:
    """Each block by itself: blocks of one shape share what was compiled."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                block.compile(dynamic=False)


def claim(folder: Path, recipe: Any, data: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Write down what `folder` is a run of, or compare where it is one.

    `recipe` is a dataclass; `data` says what it is trained on. Raises ValueError that names what
    differs, and for a folder that holds something else; OSError where it cannot be written.
    """
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    facts = json.loads(json.dumps({"recipe": asdict(recipe), "data": dict(data)}, default=str))
    path = folder / RECIPE_FILE
    if path.exists():
        found = differences(facts, json.loads(path.read_text()))
        if found:
            raise ValueError(f"{folder} holds another run ({'; '.join(found)}): take a new folder")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and holds no {RECIPE_FILE}: take a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(facts, indent=1) + "\n")
    written.replace(path)


def read_claim(folder: Path) -> dict[str, Any]:
    """What `claim` wrote. Raises ValueError for a folder that is no run."""
    try:
        return json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no run: {RECIPE_FILE}: {error}") from None
