"""`rae train` and `rae eval`; server/cli.py mounts both. Needs the `train` extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from rae.models.checkpoint import DECODER_FILE, DIT_DH_FILE, GUIDE_FILE, load_checkpoint
from rae.models.checkpoint_config import CheckpointError
from rae.training.digits import SAMPLES_PER_CLASS, Recipe, train_digits
from rae.training.digits_judge import (
    Criterion,
    evaluate,
    generate_default,
    protocol_labels,
    save_grid,
)
from rae.training.loop import DivergedError

FILES = (DIT_DH_FILE, DECODER_FILE, GUIDE_FILE)
WRITTEN = (*FILES, "config.json")
LEFTOVERS = {"samples", "encoder", *FILES, *(Path(name).stem + ".tmp" for name in WRITTEN)}
EMBEDDED = Path(__file__).parent.parent / "models" / "digits"

OPTIONS: Any = {"no_args_is_help": True, "add_completion": False}
train_app = typer.Typer(help="Train a model and write its checkpoint folder.", **OPTIONS)
eval_app = typer.Typer(help="Measure a checkpoint.", **OPTIONS)
console = Console()


@train_app.callback()
@eval_app.callback()
def _group() -> None:
    """A group, so that the only command keeps its name. transformers' own bars stay away."""
    disable_progress_bar()


@train_app.command("digits")
def train_digits_command(
    out: Annotated[Path, typer.Option(help="Folder to write; samples/ shows the progress.")],
    seed: Annotated[int, typer.Option(help="Of weights, augmentation and noise.")] = Recipe.seed,
    bf16: Annotated[
        bool, typer.Option(help="bfloat16 matmuls: twice as fast where the CPU has them.")
    ] = Recipe.bf16,
) -> None:
    """Train the embedded model of handwritten digits: encoder, decoder, DiT^DH and guide."""
    problem = unusable(out)
    if problem:
        raise typer.BadParameter(problem, param_hint="--out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{out}: {error.strerror}", param_hint="--out") from None
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            train_digits(out, Recipe(seed=seed, bf16=bf16), progress)
    except KeyboardInterrupt:
        console.print(f"Stopped. {out} holds no checkpoint; it can be trained into again.")
        raise typer.Exit(130) from None
    except OSError as error:
        console.print(f"Cannot write to {out}: {error}")
        raise typer.Exit(1) from None
    except DivergedError as error:
        console.print(f"Training diverged: {error}. Try another --seed, or --no-bf16.")
        raise typer.Exit(1) from None
    console.print(f"Wrote {out}. Measure it: rae eval digits --checkpoint {out}")


@eval_app.command("digits")
def eval_digits_command(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint folder.")] = EMBEDDED,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as well.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Only write a PNG of 8 digits per class, twice as large.")
    ] = None,
) -> None:
    """Generate 1,000 digits and hold them against the real ones; exit 1 below a bound."""
    for file in (json_file, grid):
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(f"{file.parent} is not a folder")
    try:
        loaded = load_checkpoint(checkpoint, with_encoder=grid is None)
    except CheckpointError as error:
        raise typer.BadParameter(str(error), param_hint="--checkpoint") from None
    if grid is not None:
        labels = protocol_labels(len(loaded.config.classes), SAMPLES_PER_CLASS)
        save_grid(generate_default(loaded, labels), SAMPLES_PER_CLASS, grid, scale=2)
        return
    with console.status("Generating 1,000 digits with each guidance: minutes on 2 cores"):
        try:
            criteria = evaluate(loaded)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--checkpoint") from None
    console.print(table(criteria))
    if json_file is not None:
        figures = [criterion.to_dict() for criterion in criteria]
        json_file.write_text(json.dumps({"sha256": loaded.sha256, "criteria": figures}, indent=1))
    if any(criterion.passed is False for criterion in criteria):
        raise typer.Exit(1)


def unusable(out: Path) -> str | None:
    """Why training may not write to `out`; what an interrupted run left may lie there."""
    if out.exists() and not out.is_dir():
        return f"{out} is not a folder"
    found = sorted(path.name for path in out.glob("*") if path.name not in LEFTOVERS)
    if found:
        return f"{out} is not empty: it holds {', '.join(found[:5])}"
    return None


def table(criteria: list[Criterion]) -> Table:
    result = Table("figure", "value", "at least", "")
    for item in criteria:
        digits = 1 if item.unit else 3
        bound = "" if item.bound is None else f"{item.bound:.{digits}f} {item.unit}"
        verdict = {None: "", True: "[green]pass", False: "[red]fail"}[item.passed]
        result.add_row(item.name, f"{item.value:.{digits}f} {item.unit}", bound, verdict)
    return result
