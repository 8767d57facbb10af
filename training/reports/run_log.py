"""`log.jsonl`: what a run measured, a line each time, without what a resumed run does again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"

LogRow = Mapping[str, float | None]


class RunLog:
    """Appends to `path`; a row that could not be written whole is taken back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.end: int | None = None

    def start(self, step: int) -> None:
        """Keep the rows of steps up to `step`. Raises OSError."""
        self.path.touch()
        with self.path.open("r+b") as file:
            self.end = kept_bytes(file.read(), step)
            file.truncate(self.end)

    def append(self, row: LogRow) -> None:
        """A value that is no number is written as null. Raises OSError: the row is lost then,
        those before stay."""
        if self.end is None:
            raise OSError(f"{self.path} could not be opened")
        values = {key: value if is_finite(value) else None for key, value in row.items()}
        line = (json.dumps(values) + "\n").encode()
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self.end)
            file.seek(self.end)
            if file.write(line) != len(line):
                raise OSError(f"{self.path}: only a part of a line could be written")
        self.end += len(line)


def kept_bytes(content: bytes, step: int) -> int:
    """How many of a log's bytes are rows of steps up to `step`: the rest is of steps that come
    again, or was being written when the process was killed."""
    end = 0
    for line in content.splitlines(keepends=True):
        row = parse(line)
        if row is None or row["step"] > step or not line.endswith(b"\n"):
            break
        end += len(line)
    return end


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that is not whole is left out. Raises OSError."""
    return list(_rows(path.read_bytes()))


def _rows(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.splitlines():
        row = parse(line)
        if row is None:
            return
        yield row


def parse(line: bytes) -> dict[str, Any] | None:
    """None for what is no row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
