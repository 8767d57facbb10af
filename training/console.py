"""What the commands of `rae train` and `rae eval` share towards people. Light."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

GOES_ON = "Stopped: the same command goes on."
NOTHING_WRITTEN = "Stopped: nothing is written."
INTERRUPTED = 130

Advance = Callable[[int], None]
Track = Callable[[str, int], Advance]
"""Of what is done, and of how many images; the result is told each number that is done."""


@contextmanager
def clear_errors(stopped: str = GOES_ON) -> Iterator[None]:
    """What a person can mend is one line on stderr and exit code 2, a run that failed 1.

    Ctrl-C says `stopped`, what there is to be done then, and exits with 130; a training that a
    signal has ended exits with 128 + its number, as shells count.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(stopped, err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        if isinstance(error, RuntimeError):
            from rae.training.trainer import DivergedError, StoppedError

            if isinstance(error, StoppedError):
                line = f"Stopped by {error.signal.name}, and saved: the same command goes on."
                typer.echo(line, err=True)
                raise typer.Exit(128 + error.signal) from None
            if not isinstance(error, DivergedError):
                raise
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is missing: pip install 'rae-server[train]'"
        typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def require_folder_of(file: Path | None) -> None:
    """Hours of work should not end at a file that cannot be written. Raises ValueError."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{file.parent} is not a folder")


def require_new(file: Path) -> None:
    """Nor should another command's hours be lost. Raises ValueError."""
    if file.exists():
        raise ValueError(f"{file} exists: take another name, or remove it")


@contextmanager
def progress(rank: int = 0, size: int = 1) -> Iterator[Track]:
    """Bars on stderr of the first of `size` processes; the others do as much meanwhile."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    is_hidden = rank > 0 or not console.is_terminal  # a log would get an empty line
    with Progress(*columns, console=console, transient=True, disable=is_hidden) as bars:

        def track(description: str, total: int) -> Advance:
            task = bars.add_task(description, total=total, speed="")

            def advance(count: int) -> None:
                bars.advance(task, count * size)
                speed = bars.tasks[task].speed
                bars.update(task, speed=f"{speed:.0f} images/s" if speed else "")

            return advance

        yield track
