"""What is no fault of a request: memory that was not there, on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What CPU allocations, copies to pinned memory and cuBLAS say; only CUDA's allocator has a type.
MESSAGES = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class NoMemoryError(Exception):
    """There was no memory; smaller work may fit.

    While this is handled its traceback holds what had been computed: that is free only after.
    """


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise NoMemoryError for all the ways in which allocations fail. Also a decorator."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoMemoryError(str(error)) from error
    except RuntimeError as error:
        if any(message in str(error) for message in MESSAGES):
            raise NoMemoryError(str(error)) from error
        raise


def free_cached(device: torch.device) -> None:
    """Wait for what was sent to `device`, and give back what its allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
