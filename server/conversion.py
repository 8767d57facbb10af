"""`rae convert`: which published files its flags mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rae.models import hub
from rae.models.convert import convert
from rae.models.diffusers_rae import DiffusersAutoencoder
from rae.models.published import Published
from rae.models.published_yaml import read_yaml
from rae.server.command_settings import ConvertSettings


def run(settings: ConvertSettings, notify: Callable[[str], None]) -> None:
    """Raises ValueError for flags that do not go together, and whatever `convert` raises."""
    convert(
        published(settings),
        settings.out,
        dtype=settings.dtype,
        classes=settings.classes and read_classes(settings.classes),
        encoder=settings.encoder,
        notify=notify,
    )


def published(settings: ConvertSettings) -> Published:
    root, rae = settings.root or Path(), settings.autoencoder
    if settings.config is not None and settings.preset is not None:
        raise ValueError("--config and --preset are two models; give one")
    if settings.from_hub and (settings.preset is None or settings.root is not None):
        raise ValueError("--from-hub goes with --preset and without --root")
    if settings.config is not None:
        model = read_yaml(settings.config, root)
    elif settings.preset is not None:
        model = hub.preset(settings.preset)
        if settings.from_hub:
            root = hub.download(settings.preset)
        model = hub.below(model, root, hub.HUB_REPOSITORY if settings.from_hub else None)
    elif rae is not None:
        return Published(name=rae.name, autoencoder=DiffusersAutoencoder(rae))
    else:
        raise ValueError("what should be converted? Give --config, --preset or --autoencoder")
    return replace(model, autoencoder=DiffusersAutoencoder(rae)) if rae else model


def read_classes(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
