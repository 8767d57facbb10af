"""Locks between processes of one machine."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def held(lock: IO[str], *, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock, which a process gives back however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        is_mine = False
    else:
        is_mine = True
    try:
        yield is_mine
    finally:
        if is_mine:
            fcntl.flock(lock, fcntl.LOCK_UN)
