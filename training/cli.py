"""`rae train` and `rae eval`; server/cli.py mounts both. Needs the `train` extra."""

from __future__ import annotations

from typing import Any

import typer

from rae.training import stage_cli
from rae.training.data import data_cli
from rae.training.digits import digits_cli
from rae.training.evaluation import eval_cli
from rae.training.planning import plan_cli
from rae.training.reports import plot_cli

OPTIONS: Any = {"no_args_is_help": True, "add_completion": False}
train_app = typer.Typer(help="Train a model and write its checkpoint folder.", **OPTIONS)
eval_app = typer.Typer(help="Measure images, or a checkpoint.", **OPTIONS)


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
