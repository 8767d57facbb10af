"""`rae train` and `rae eval`; server/cli.py mounts both. Needs the `train` extra."""

from __future__ import annotations

from typing import Any

import typer
from transformers.utils.logging import disable_progress_bar

from rae.training import data_cli, digits_cli, eval_cli, plan_cli, plot_cli, stage_cli

OPTIONS: Any = {"no_args_is_help": True, "add_completion": False}
train_app = typer.Typer(help="Train a model and write its checkpoint folder.", **OPTIONS)
eval_app = typer.Typer(help="Measure images, or a checkpoint.", **OPTIONS)


@train_app.callback()
@eval_app.callback()
def _group() -> None:
    """transformers' own bars stay away."""
    disable_progress_bar()


train_app.command("decoder")(stage_cli.decoder)
train_app.command("stats")(data_cli.stats)
train_app.command("encode")(data_cli.encode)
train_app.command("dit")(stage_cli.dit)
train_app.command("assemble")(stage_cli.assemble)
train_app.command("digits")(digits_cli.train)
train_app.command("plan")(plan_cli.plan_command)
train_app.command("plot")(plot_cli.plot_command)
eval_app.command("samples")(eval_cli.samples)
eval_app.command("reconstruction")(eval_cli.reconstruction)
eval_app.command("stats")(eval_cli.stats)
eval_app.command("digits")(digits_cli.evaluate)
