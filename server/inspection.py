"""`rae info`: what a checkpoint folder holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import AutoencoderConfig, CheckpointConfig, read_any_config
from rae.server.limits import Limits


def report(folder: Path, console: Console) -> None:
    """Show a checkpoint folder. Raises CheckpointError for one that cannot be used."""
    config, sha256 = read_any_config(folder)
    generator = generator_rows(folder) if isinstance(config, CheckpointConfig) else {}
    size = config.decoder.image_size
    rows = {
        "name": config.name,
        "sha256": sha256,
        "image": f"{size} × {size} px",
        "latents": f"{config.decoder.latent_channels} × {config.decoder.grid} × "
        f"{config.decoder.grid}",
        **generator,
        "encoder": encoder_of(config),
        "source": config.source or "not recorded",
        "licence": config.license or "not recorded",
        **{name: f"{(folder / name).stat().st_size / 1e6:.2f} MB" for name in config.sha256},
    }
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def generator_rows(folder: Path) -> dict[str, str]:
    """What only a folder with a DiT^DH has; it is loaded, its files' sha256 are checked."""
    checkpoint = load_checkpoint(folder)
    config, defaults = checkpoint.config, checkpoint.config.defaults
    limits = Limits.of(config, max_steps=defaults.steps, max_images=1)
    parameters = checkpoint.num_parameters
    return {
        "classes": f"{len(config.classes)}: {limits.class_names}",
        **{f"{name} parameters": f"{count:,}" for name, count in parameters.items()},
        "shift": f"{config.shift:g}",
        "defaults": ", ".join(f"{key} {value}" for key, value in asdict(defaults).items()),
        "guidance": ", ".join(limits.methods) or "none",
    }


def encoder_of(config: AutoencoderConfig) -> str:
    """Which encoder the RAE was trained with, and whether the folder holds it."""
    if config.encoder is None:
        return "none"
    name = f"{config.encoder.name or config.encoder.kind} at {config.encoder.image_size} px"
    return name if config.has_encoder else f"{name}, not in this folder"
