"""The endless stream of training samples, and a single pass over a data set.

Position p of the stream is in epoch p // N, at place p % N of that epoch's order. A step's batch
is a range of positions, whatever the processes, the micro-batches and the workers are; nothing is
left out where an epoch ends, and a run goes on at any step.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rae.training.batch import Batch
from rae.training.data.samples import Sample, Samples
from rae.training.data.transforms import UnreadableError
from rae.training.data.unreadable import Unreadable
from rae.training.draws import generator

if TYPE_CHECKING:  # its imports would take a second of each worker
    from rae.training.distributed import World

logger = logging.getLogger(__name__)

ORDER = 100  # a purpose of draws
MAX_IN_A_ROW = 100  # by chance, in an order that is random, one data set in 2^100 of half wrecks

T = TypeVar("T")


def batches(
    samples: Samples,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int,
    world: World,
    start_step: int = 0,
    num_workers: int = 8,
    prefetch: int = 4,
) -> Iterator[Batch]:
    """The micro-batches of this process, endless, from step `start_step` on.

    `batch_size` is of all processes; each has `batch_size / (world.size · micro_batch)`
    micro-batches a step. An unreadable sample is replaced by the next of the epoch's order that
    can be read. Raises ValueError for sizes that do not divide, and, while it is read, for a data
    set of which nothing is readable.
    """
    if micro_batch < 1 or batch_size < 1 or batch_size % (world.size * micro_batch):
        raise ValueError(
            f"batch size {batch_size} is no multiple of {world.size} processes × micro-batch "
            f"{micro_batch}"
        )
    share = batch_size // world.size

    def positions() -> Iterator[list[int]]:
        for step in count(start_step):
            first = step * batch_size + world.rank * share
            for start in range(first, first + share, micro_batch):
                yield list(range(start, start + micro_batch))

    is_cuda = world.device.type == "cuda"
    return load(_Stream(samples, seed), positions(), num_workers, prefetch, pin_memory=is_cuda)


def sweep(
    samples: Samples, chunks: Sequence[Sequence[int]], num_workers: int, *, pin_memory: bool
) -> Iterator[Batch]:
    """A batch for each of `chunks`, lists of samples' numbers, which become its positions.

    Unreadable ones are logged and left out: a batch of none has neither images nor latents.
    """
    unreadable = Unreadable(logger.warning)
    for batch in load(_Sweep(samples), chunks, num_workers, 4, pin_memory=pin_memory):
        unreadable.add(batch.unreadable)
        yield batch


@lru_cache(maxsize=2)  # a batch may be of two epochs
def permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator("cpu", seed, epoch, ORDER))


@dataclass(frozen=True)
class _Stream(Dataset[Any]):
    samples: Samples
    seed: int

    def __getitem__(self, positions: list[int]) -> Batch | ValueError:
        unreadable: dict[int, str] = {}
        try:
            return collate(
                self.samples.field,
                {position: self.read(position, unreadable) for position in positions},
                unreadable,
            )
        except ValueError as error:  # a worker's exception would come with its traceback
            return error

    def read(self, position: int, unreadable: dict[int, str]) -> Sample:
        size = len(self.samples)
        epoch, place = divmod(position, size)
        order = permutation(self.seed, epoch, size)
        tries, last = min(size, MAX_IN_A_ROW), ""
        for index in (int(order[(place + step) % size]) for step in range(tries)):
            try:
                return self.samples.load(index, self.seed, position)
            except UnreadableError as error:
                last = unreadable[index] = f"{self.samples.name(index)}: {error}"
        raise ValueError(f"{tries} images in a row cannot be read, the last is {last}")


@dataclass(frozen=True)
class _Sweep(Dataset[Any]):
    samples: Samples

    def __getitem__(self, indices: Sequence[int]) -> Batch | ValueError:
        unreadable: dict[int, str] = {}
        found: dict[int, Sample] = {}
        for index in indices:
            try:
                found[index] = self.samples.load(index, 0, index)
            except UnreadableError as error:
                unreadable[index] = f"{self.samples.name(index)}: {error}"
            except ValueError as error:
                return error
        return collate(self.samples.field, found, unreadable)


def collate(field: str, samples: dict[int, Sample], unreadable: dict[int, str]) -> Batch:
    values = {field: torch.stack([sample.value for sample in samples.values()])} if samples else {}
    return Batch(
        positions=torch.tensor(list(samples), dtype=torch.int64),
        class_labels=torch.tensor([s.class_label for s in samples.values()], dtype=torch.int64),
        unreadable=unreadable,
        **values,
    )


def load(
    dataset: Dataset[Any],
    keys: Iterable[Sequence[int]],
    num_workers: int,
    prefetch: int,
    *,
    pin_memory: bool,
) -> Iterator[Batch]:
    """`dataset[key]` for each of `keys`, in order, made ahead by workers, one a CPU at most."""
    num_workers = min(num_workers, len(os.sched_getaffinity(0)))
    workers: dict[str, Any] = {
        # Not forked: the parent has threads, and CUDA. Not by a fork server: a SIGTERM for the
        # whole process group would end it, and with it the workers, before the last step is done.
        "multiprocessing_context": "spawn",
        "prefetch_factor": prefetch,
        "worker_init_fn": _leave_signals_to_the_parent,
    }
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=keys,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the global one is left alone
        **(workers if num_workers else {}),
    )
    found = _batches(loader)
    # An error's traceback may hold this to the end, and Python would wait for workers that ignore
    # its SIGTERM. Whatever was registered last is called first: before torch sees the end coming.
    atexit.register(_close, ref(found))
    return found


def _close(found: ref[Generator[Batch]]) -> None:
    batches = found()
    if batches is not None:
        batches.close()


def _batches(loader: Iterable[Batch | ValueError]) -> Generator[Batch]:
    for loaded in loader:
        if isinstance(loaded, ValueError):
            raise loaded
        yield loaded


def _as_it_is(loaded: T) -> T:
    return loaded


def _leave_signals_to_the_parent(worker: int) -> None:
    """Who stops a run wants its last step saved: the workers end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
