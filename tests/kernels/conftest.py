"""Kernels run in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device(DEVICE), torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is NaN, so that no comparison passes."""
    empty = torch.empty
    with torch.device("cpu"):
        empty(0)  # of the functions that such a context redirects torch makes its list now

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
