"""What a checkpoint and a server allow a request to hold, and how that is said to people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Self

from rae.models.checkpoint_config import MAX_CFG, CheckpointConfig, SamplerDefaults
from rae.models.config import GuidanceMethod
from rae.models.labels import closest, first_name, shortlist

NUMBERS = ("class_id", "cfg", "steps", "n", "seed", "deadline_ms")
MAX_DEADLINE_MS = 86_400_000
SEEDS = 2**53  # what a JSON number holds exactly everywhere
LISTED_CLASSES = 12
SHOWN_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this checkpoint and this server allow."""

    classes: tuple[str, ...]
    defaults: SamplerDefaults
    has_null_label: bool
    methods: tuple[GuidanceMethod, ...]
    max_steps: int
    max_images: int

    @classmethod
    def of(cls, config: CheckpointConfig, *, max_steps: int, max_images: int) -> Self:
        if config.defaults.steps > max_steps:
            raise ValueError(
                f"the checkpoint's default of {config.defaults.steps} steps is above the limit of "
                f"{max_steps} (--max-steps)"
            )
        return cls(
            classes=config.classes,
            defaults=config.defaults,
            has_null_label=config.dit_dh.has_null_label,
            methods=config.guidance_methods,
            max_steps=max_steps,
            max_images=max_images,
        )

    @property
    def null_label(self) -> int:
        return len(self.classes)

    @property
    def class_names(self) -> str:
        """The first of them, for people."""
        more = "" if len(self.classes) <= LISTED_CLASSES else ", …; GET /classes lists all"
        return ", ".join(map(first_name, self.classes[:LISTED_CLASSES])) + more

    def classes_like(self, name: str) -> str:
        """What a name may be that no class has, for people."""
        labels = closest(self.classes, name)
        if not labels or len(self.classes) <= LISTED_CLASSES:
            return self.allowed("class_name")
        return f"a class; closest: {shortlist(self.classes, labels)}; GET /classes lists all"

    def bounds(self, field: str, n: int = 1) -> tuple[int, int]:
        """The closed range of a number of `n` images' request."""
        return {
            "class_id": (0, len(self.classes) - 1),
            "cfg": (1, MAX_CFG),
            "steps": (2, self.max_steps),
            "n": (1, self.max_images),
            "seed": (0, SEEDS - n),
            "guidance_interval": (0, 1),
            "deadline_ms": (1, MAX_DEADLINE_MS),
        }[field]

    def allowed(self, field: str, n: int = 1) -> str:
        """What a field may be, for people."""
        low, high = self.bounds(field, n) if field in NUMBERS else (0, 0)
        unconditional = ", or null for unconditional" if self.has_null_label else ""
        return {
            "class_id": f"an integer from {low} to {high}{unconditional}",
            "class_name": f"one of {self.class_names}{unconditional}",
            "cfg": f"a number from {low} (off) to {high}",
            "steps": f"an integer from {low} to {high} (grid points, 1 more than evaluations)",
            "n": f"an integer from {low} to {high}",
            "seed": f"an integer from {low} to {high} (2^53 − n), or null for a random one",
            "guidance_method": f"{' or '.join(self.methods) or 'none'} with this checkpoint",
            "guidance_interval": "[low, high] with 0 <= low <= high <= 1, in shifted time",
            "format": "png, jpeg or webp",
            "solver": "euler, the only solver that is served",
            "priority": "low, normal or high",
            "deadline_ms": f"an integer from {low} to {high} (a day)",
        }[field]


def shown(value: Any) -> str:  # noqa: ANN401
    """A JSON value as it came, cut to a readable length."""
    try:
        text = clean(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def clean(text: str) -> str:
    """Escape unpaired surrogates, valid in JSON and not in UTF-8, and cut to a line or two."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else f"{text[:200]}…"
