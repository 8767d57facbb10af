"""Which images could not be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

MAX_TOLD = 100


class Unreadable:
    """Of one process's life, each image once, however often it is read: told by `tell`, up to
    `MAX_TOLD` of them, and counted."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.numbers: set[int] = set()

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, found: Mapping[int, str]) -> None:
        """Images by their number in the data set, each with its name and what is wrong."""
        for number, text in found.items():
            if number in self.numbers:
                continue
            self.numbers.add(number)
            if len(self) <= MAX_TOLD:
                self.tell(f"skipped {text}")
            if len(self) == MAX_TOLD:
                self.tell("further unreadable images are only counted")
