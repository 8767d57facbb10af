"""Environment variables that look like settings and are none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import get_args, get_type_hints

from rae.server.access import KEYS_VARIABLE
from rae.server.serve_settings import ServeSettings

PREFIX = "RAE_"


def known_variables() -> list[str]:
    """What `rae serve` reads; other commands read none that it does not."""
    hints = get_type_hints(ServeSettings, include_extras=True)
    options = (get_args(hints[field.name])[1] for field in fields(ServeSettings))
    return [*(option.envvar for option in options), KEYS_VARIABLE]


def unknown_variables(environment: Iterable[str]) -> Iterator[str]:
    """A line for people about each name that nothing reads; its value may be a secret."""
    known = known_variables()
    for name in sorted(set(environment) - set(known)):
        if name.startswith(PREFIX):
            closest = get_close_matches(name, known, 1, cutoff=0.0)[0]
            yield f"{name} is set, but nothing reads it; the closest that is read is {closest}"
