"""The processes that train together: started by torchrun, or one alone."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rae.training.run_settings import Strategy

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Which of `size` processes this is, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes, in place; each has the same."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.size

    def any(self, value: bool) -> bool:
        """Whether it is true in one of them."""
        return bool(self.sum(torch.tensor(float(value), device=self.device)).item())

    def gather(self, value: T) -> list[T]:
        """That of each process, in their order; small ones, for they are pickled."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world that torchrun's environment names: gloo between CPUs, NCCL between GPUs.

    Raises ValueError for a device that this machine does not have.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    own = own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if "RANK" not in os.environ:
        yield World(0, 1, own)
        return
    is_cuda = own.type == "cuda"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        rank=rank,
        world_size=size,
        device_id=own if is_cuda else None,
    )
    try:
        yield World(rank, size, own)
    finally:
        dist.destroy_process_group()
        if not is_cuda:
            # A thread of gloo's drops the tensors of the last collective a moment after it is over,
            # and takes the GIL for it. If Python ends first, the process aborts: 2 of 66 did.
            time.sleep(0.2)


def own_device(device: str, local_rank: int) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r}; known: auto, cpu, cuda")
    if device == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        raise ValueError(f"process {local_rank} of this machine has no GPU: there are {count}")
    return torch.device("cuda", local_rank)


def parallelize(module: nn.Module, world: World, strategy: Strategy) -> nn.Module:
    """What to call so that gradients are averaged over `world`: `module` alone, in DDP, or
    sharded by FSDP2, in place."""
    if world.size == 1:
        return module
    if strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)
    # Nothing here writes into what a block or a linear has returned.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in shard_units(module):
        fully_shard(unit, mesh=mesh)
    # By default the root keeps what it gathered until a backward: after a forward without one, as
    # for samples by the averages, the next step would run with old weights.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def shard_units(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks, and before each the adaLN linears that run outside of them."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                adaln = getattr(block, "adaLN_modulation", None)
                yield from [adaln] if isinstance(adaln, nn.Module) else []
                yield block


def set_sync(parallel: nn.Module, is_last: bool) -> None:
    """Whether the coming forward and backward end an accumulation: only then gradients are
    averaged over the processes."""
    if isinstance(parallel, DistributedDataParallel):
        parallel.require_backward_grad_sync = is_last
    elif hasattr(parallel, "set_requires_gradient_sync"):
        parallel.set_requires_gradient_sync(is_last)  # type: ignore[operator]
