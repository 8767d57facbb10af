"""Locks, as far as the file system has them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO

from rae.models.locks import held

logger = logging.getLogger(__name__)


@contextmanager
def held_if_possible(lock: IO[str], *, wait: bool, unprotected: str) -> Iterator[bool]:
    """As `held`. Where the file system has no locks, which network ones may not, that is a warning
    that says what is `unprotected`, and the lock counts as this process's."""
    with ExitStack() as stack:
        try:
            is_mine = stack.enter_context(held(lock, wait=wait))
        except OSError as error:
            logger.warning("%s cannot be locked (%s): %s", lock.name, error.strerror, unprotected)
            is_mine = True
        yield is_mine
