"""`rae train plot`: curves of one run, or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

COMPARED_FILE = "compared.png"


def plot_command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs; several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="A PNG.", show_default="loss.png, of several runs compared.png, in the first"
        ),
    ] = None,
) -> None:
    """Draw loss, learning rate, speed and whatever else the runs' logs have."""
    from rae.training.reports.plots import draw_runs
    from rae.training.reports.report import PLOT_FILE
    from rae.training.reports.run_log import LOG_FILE

    logs = [run / LOG_FILE for run in runs]
    for log in logs:
        if not log.is_file():
            raise typer.BadParameter(f"{log.parent} has no {LOG_FILE}", param_hint="RUNS")
    target = out or runs[0] / (PLOT_FILE if len(runs) == 1 else COMPARED_FILE)
    console = Console()
    try:
        draw_runs(logs, target)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="RUNS") from None
    except (ImportError, OSError) as error:
        console.print(f"Cannot draw: {error}", markup=False)
        raise typer.Exit(1) from None
    console.print(f"Wrote {target}", markup=False)
