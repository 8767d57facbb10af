"""What commands say to people."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: str, exit_code: int = 1) -> NoReturn:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(exit_code)
