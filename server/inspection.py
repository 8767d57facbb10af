"""`rae info`: what a checkpoint folder holds, and whether its files are the recorded ones."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rae.models.checkpoint import load_checkpoint
from rae.models.checkpoint_config import AutoencoderConfig
from rae.models.tensor_files import file_problem
from rae.server.limits import Limits
from rae.server.schemas import ModelInfo


def report(folder: Path, console: Console) -> list[str]:
    """Show a checkpoint folder; returns what is wrong with its files. Raises CheckpointError."""
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    limits = Limits.of(config, max_steps=config.defaults.steps, max_images=1)
    model = ModelInfo.of(checkpoint, limits)
    table = Table(title=str(folder), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    defaults = ", ".join(f"{key} {value}" for key, value in model.defaults.items())
    rows = {
        "name": model.name,
        "sha256": model.sha256,
        "classes": f"{model.num_classes}: {limits.class_names}",
        "image": f"{model.image_size} × {model.image_size} px",
        "latents": " × ".join(map(str, model.latent_shape)),
        **{f"{name} parameters": f"{count:,}" for name, count in model.parameters.items()},
        "encoder": encoder_of(config),
        "shift": f"{model.shift:g}",
        "defaults": defaults,
        "guidance": ", ".join(model.guidance_methods) or "none",
        "source": model.source or "not recorded",
        "licence": model.license or "not recorded",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    problems = []
    for name, recorded in config.sha256.items():
        problem = file_problem(folder / name, recorded)
        if problem:
            problems.append(problem)
            table.add_row(name, problem, style="red")
        else:
            size_mb = (folder / name).stat().st_size / 1e6
            table.add_row(name, f"{size_mb:.2f} MB, sha256 as recorded")
    if not config.sha256:
        table.add_row("files", "no sha256 recorded")
    console.print(table)
    return problems


def encoder_of(config: AutoencoderConfig) -> str:
    """Which encoder the RAE was trained with, and whether the folder holds it."""
    if config.encoder is None:
        return "none"
    name = f"{config.encoder.name or config.encoder.kind} at {config.encoder.image_size} px"
    return name if config.has_encoder else f"{name}, not in this folder"
