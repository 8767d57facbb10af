"""What commands say to people."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer


def say(text: str) -> None:
    """A line on stdout. Where that is full or closed, this line and all later ones are dropped."""
    try:
        typer.echo(text)
    except OSError:
        # Python would fail to write it once more when it exits, with code 120.
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def fail(message: str, exit_code: int = 1) -> NoReturn:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(exit_code)
