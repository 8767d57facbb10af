"""Folders that appear whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_empty(folder: Path) -> None:
    """Raises ValueError where `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end, or is removed after an error.

    It lies beside `out`, or in it where that exists, which may be a mounted volume or a link.
    Raises what `require_empty` raises.
    """
    out = Path(os.path.abspath(out))
    require_empty(out)
    exists = out.exists()
    parent = out if exists else out.parent
    parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: another process may be at the same work.
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    folder.chmod(0o755)
    try:
        yield folder
        if exists:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                path.rename(out / path.name)  # config.json last: it makes a checkpoint of a folder
        else:
            folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
