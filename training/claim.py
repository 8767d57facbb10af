"""Whose run a folder holds: one recipe, one data set, one training at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rae.training.data.tensor_writing import write_text
from rae.training.locking import held_if_possible
from rae.training.overrides import differences
from rae.training.snapshots import SNAPSHOTS, steps_in

RECIPE_FILE, CHECKPOINT, LOCK_FILE = "recipe.json", "checkpoint", "lock"
UNPROTECTED = "a second training there would not be refused, and both would spoil the run"
LEFT_BEHIND = {LOCK_FILE, "recipe.tmp"}
"""By who was killed before the recipe was there."""


@contextmanager
def claimed(folder: Path, recipe: Any, data: Mapping[str, Any]) -> Iterator[None]:  # noqa: ANN401
    """Hold `folder` as the run of `recipe`, a dataclass, on `data`, and write that down in it.

    A run that has saved nothing gives way to another. Raises ValueError that names what differs
    from one that has, for a folder that holds something else, and while another process trains in
    it, as far as its file system has locks; OSError where it cannot be written.
    """
    assert is_dataclass(recipe) and not isinstance(recipe, type)
    facts = json.loads(json.dumps({"recipe": asdict(recipe), "data": dict(data)}, default=str))
    found = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if found - LEFT_BEHIND and RECIPE_FILE not in found:
        raise ValueError(f"{folder} is not empty, and holds no {RECIPE_FILE}: take a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOCK_FILE).open("w") as lock,
        held_if_possible(lock, wait=False, unprotected=UNPROTECTED) as is_mine,
    ):
        if not is_mine:
            raise ValueError(f"another process trains in {folder}")
        if not has_saved(folder):
            write_text(folder / RECIPE_FILE, json.dumps(facts, indent=1) + "\n")
        elif differ := differences(facts, read_claim(folder)):
            raise ValueError(f"{folder} holds another run ({'; '.join(differ)}): take a new folder")
        yield


def has_saved(folder: Path) -> bool:
    """Whether a run, or a stage of it, has left what may not be lost."""
    snapshots = folder.glob(f"**/{SNAPSHOTS}")
    return (folder / CHECKPOINT).exists() or any(steps_in(path) for path in snapshots)


def read_claim(folder: Path) -> dict[str, Any]:
    """What `claimed` wrote. Raises ValueError for a folder that is no run."""
    try:
        return json.loads((folder / RECIPE_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no run: {RECIPE_FILE}: {error}") from None
