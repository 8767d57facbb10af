"""How allocations fail, and what is no such failure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rae.server.memory import NoMemoryError, memory_errors


def fail(error: Exception) -> Callable[[], object]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**50),
        lambda: np.empty(2**50),
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")),
        fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported")),
        fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")),
    ],
    ids=["torch's cpu", "numpy", "cuda's allocator", "pinned", "cublas"],
)
def test_all_kinds_are_one(work: Callable[[], object]) -> None:
    with pytest.raises(NoMemoryError), memory_errors():
        work()


@pytest.mark.parametrize("error", [RuntimeError("an illegal memory access"), ValueError("memory")])
def test_what_is_something_else_stays_it(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, memory_errors():
        raise error
    assert raised.value is error
