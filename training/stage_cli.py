"""`rae train decoder`, `rae train dit` and `rae train assemble`."""

from __future__ import annotations

from rae.models.command_line import takes
from rae.training.console import NOTHING_WRITTEN, clear_errors
from rae.training.overrides import override
from rae.training.run_settings import AssembleSettings, DecoderSettings, DiTSettings
from rae.training.stage1.decoder_recipe import DECODER_PRESETS
from rae.training.stage2.presets import DIT_PRESETS


@takes(DecoderSettings)
def decoder(settings: DecoderSettings) -> None:
    """Stage 1: train an RAE's decoder on images. OUT/checkpoint is the RAE for stage 2.

    For several GPUs `rae train plan PRESET` prints the command.
    """
    with clear_errors():
        recipe = override(DECODER_PRESETS[settings.preset], settings.changes or [])
        from rae.training.stages import run_decoder

        run_decoder(settings, recipe)


@takes(DiTSettings)
def dit(settings: DiTSettings) -> None:
    """Stage 2: train a DiT^DH, an early guide or a plain DiT on an RAE's latents.

    OUT/checkpoint is for `rae serve --model`. For several GPUs `rae train plan PRESET` prints the
    command.
    """
    with clear_errors():
        recipe = override(DIT_PRESETS[settings.preset], settings.changes or [])
        from rae.training.stages import run_dit

        run_dit(settings, recipe)


@takes(AssembleSettings)
def assemble(settings: AssembleSettings) -> None:
    """Put a DiT^DH, its guide and an RAE into one checkpoint folder."""
    with clear_errors(NOTHING_WRITTEN):
        from rae.training.stages import run_assemble

        run_assemble(settings)
