"""`rae train digits` and `rae eval digits`."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rae.training.console import NOTHING_WRITTEN, clear_errors, require_folder_of
from rae.training.run_settings import RunSettings

if TYPE_CHECKING:
    from rae.training.digits.digits_judge import Criterion
    from rae.training.reports.report import RunReport

EMBEDDED = Path(__file__).parents[2] / "models" / "digits"

console = Console()


def train(
    out: Annotated[Path, typer.Option(help="Folder of all stages; OUT/checkpoint is the model.")],
    seed: Annotated[int, typer.Option(help="Of weights, augmentation and noise.")] = 0,
    bf16: Annotated[
        bool, typer.Option(help="bfloat16 matmuls: twice as fast where the CPU has them.")
    ] = True,
) -> None:
    """Train the embedded model of handwritten digits: encoder, decoder, DiT^DH and guide.

    Started again after an interruption it goes on.
    """
    settings = RunSettings(
        out=out,
        precision="bf16" if bf16 else "fp32",
        num_workers=0,
        log_every=50,
        sample_every=1000,
        snapshot_every=500,
    )
    with clear_errors(), ExitStack() as stack:
        from rae.training.digits.pipeline import DigitsRecipe, train_digits
        from rae.training.distributed import joined
        from rae.training.reports.report import RunReport

        def make_report(name: str, folder: Path) -> RunReport:
            console.print(name)
            return stack.enter_context(closing(RunReport(folder, console=console)))

        world = stack.enter_context(joined())
        train_digits(out, DigitsRecipe(seed=seed), settings, world, make_report)
    checkpoint = out / "checkpoint"
    console.print(f"Wrote {checkpoint}. Measure it: rae eval digits --checkpoint {checkpoint}")


def evaluate(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint folder.")] = EMBEDDED,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as well.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Only write a PNG of 8 digits per class, twice as large.")
    ] = None,
) -> None:
    """Generate 1,000 digits and hold them against the real ones; exit 1 below a bound."""
    with clear_errors(NOTHING_WRITTEN):
        from rae.models.checkpoint import load_checkpoint
        from rae.training.digits.digits_judge import (
            SAMPLES_PER_CLASS,
            generate_default,
            judge_checkpoint,
            protocol_labels,
        )
        from rae.training.reports.grid import save_grid

        for file in (json_file, grid):
            require_folder_of(file)
        loaded = load_checkpoint(checkpoint, with_encoder=grid is None)
        if grid is not None:
            labels = protocol_labels(len(loaded.config.classes), SAMPLES_PER_CLASS)
            save_grid(
                generate_default(loaded, labels), SAMPLES_PER_CLASS, grid, scale=2, num_colours=64
            )
            return
        with console.status("Generating 1,000 digits with each guidance: minutes on 2 cores"):
            criteria = judge_checkpoint(loaded)
    console.print(table(criteria))
    if json_file is not None:
        figures = [criterion.to_dict() for criterion in criteria]
        json_file.write_text(json.dumps({"sha256": loaded.sha256, "criteria": figures}, indent=1))
    if any(criterion.passed is False for criterion in criteria):
        raise typer.Exit(1)


def table(criteria: list[Criterion]) -> Table:
    result = Table("figure", "value", "at least", "")
    for item in criteria:
        digits = 1 if item.unit else 3
        bound = "" if item.bound is None else f"{item.bound:.{digits}f} {item.unit}"
        verdict = {None: "", True: "[green]pass", False: "[red]fail"}[item.passed]
        result.add_row(item.name, f"{item.value:.{digits}f} {item.unit}", bound, verdict)
    return result
