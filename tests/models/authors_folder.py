"""A folder in the authors' layout that a test edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from rae.models.published import Published
from rae.models.published_yaml import read_yaml


@dataclass
class AuthorsFolder:
    """`config` is the YAML file's contents; `published` reads what it says by then."""

    root: Path
    config: dict[str, Any]

    @property
    def yaml(self) -> Path:
        path = self.root / "model.yaml"
        path.write_text(yaml.safe_dump(self.config))
        return path

    def published(self) -> Published:
        return read_yaml(self.yaml, self.root)

    def edit(self, path: str, value: object) -> None:
        """Set "stage_1.params.eps", say."""
        *sections, key = path.split(".")
        section = self.config
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = value

    def edit_weights(self, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = torch.load(self.root / file, weights_only=True)
        change(tensors)
        torch.save(tensors, self.root / file)
