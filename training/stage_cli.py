"""`rae train decoder`, `rae train dit` and `rae train assemble`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from rae.models.command_line import takes
from rae.training.run_settings import AssembleSettings, DecoderSettings, DiTSettings


@contextmanager
def clear_errors() -> Iterator[None]:
    """What a person can mend is one line and exit code 2; a run that failed, 1."""
    try:
        yield
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        from rae.training.trainer import DivergedError, StoppedError

        if isinstance(error, StoppedError):
            typer.echo(str(error))
            raise typer.Exit(128 + error.signal) from None
        if isinstance(error, RuntimeError) and not isinstance(error, DivergedError):
            raise
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


@takes(DecoderSettings)
def decoder(settings: DecoderSettings) -> None:
    """Stage 1: train an RAE's decoder on images. OUT/checkpoint is the RAE for stage 2.

    For several GPUs `rae train plan PRESET` prints the command.
    """
    with clear_errors():
        from rae.training.stages import run_decoder

        run_decoder(settings)


@takes(DiTSettings)
def dit(settings: DiTSettings) -> None:
    """Stage 2: train a DiT^DH, an early guide or a plain DiT on an RAE's latents.

    OUT/checkpoint is for `rae serve --model`. For several GPUs `rae train plan PRESET` prints the
    command.
    """
    with clear_errors():
        from rae.training.stages import run_dit

        run_dit(settings)


@takes(AssembleSettings)
def assemble(settings: AssembleSettings) -> None:
    """Put a DiT^DH, its guide and an RAE into one checkpoint folder."""
    with clear_errors():
        from rae.training.stages import run_assemble

        run_assemble(settings)
