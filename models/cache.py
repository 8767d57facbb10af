"""Where this machine keeps what can be made again."""

from __future__ import annotations

import os
import re
from pathlib import Path

HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<preset>[\w.-]+)")


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "rae-server"


def model_folder(repository: str, preset: str) -> Path:
    """Where a published model is, once it was downloaded and converted."""
    return cache_folder() / repository.replace("/", "--") / preset


def converted(model: str) -> Path | None:
    """The folder of REPOSITORY:PRESET, if it is there already."""
    match = HUB_NAME.fullmatch(model)
    folder = model_folder(match["repository"], match["preset"]) if match else None
    return folder if folder is not None and (folder / "config.json").exists() else None
