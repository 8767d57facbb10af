"""Run the frozen encoder once over a data set, and keep its latents (`LatentShards`).

A shard is a range of the images' numbers, so what is in it depends on no process and no earlier
run: a run that was killed goes on with the shards that are not there yet, and one that was whole
makes again what has been lost or damaged since.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rae.models.tensor_files import file_sha256
from rae.training.batch import Batch
from rae.training.data.image_encoder import ImageEncoder
from rae.training.data.latent_shards import INDEX_FILE, LatentIndex, ShardEntry
from rae.training.data.samples import Samples
from rae.training.data.stream import sweep
from rae.training.data.tensor_writing import DamagedError, read_facts, write_whole
from rae.training.distributed import World

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

OnBatch = Callable[[int], None]
T = TypeVar("T")


def encode_dataset(
    samples: Samples,
    encoder: ImageEncoder,
    out: Path,
    index: LatentIndex,
    world: World,
    *,
    batch_size: int,
    num_workers: int,
    on_batch: OnBatch,
) -> LatentIndex:
    """Write the shards of `index` that are not whole in `out`, then index.json; returns it whole.

    All bytes that are there are hashed: that is limited by the disk, and takes a small part of
    what encoding them took. A run that did not end has left no hashes, but whole files alone.
    `samples` yield images without random parts. `on_batch` gets the number of images that are
    done, in this process. Raises ValueError for a folder of other latents and for data of which
    nothing is readable, OSError for a full disk: the shards that are there stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    world.barrier()
    recorded, names = recorded_shards(out, index), shard_names(index)
    found: dict[str, ShardEntry] = {}
    for name in share(names, world):
        entry = whole_shard(out / name, recorded.get(name))
        if entry is not None:
            found[name] = entry
            on_batch(entry.num_rows + entry.num_skipped)
    entries = gathered(found, world)  # until here nobody writes: all have found the same
    todo = [number for number, name in enumerate(names) if name not in entries]
    if recorded and not todo:
        return LatentIndex.read(out)
    if world.is_first:
        warn_of_losses(out, [names[number] for number in todo], recorded)
    own = share(todo, world)
    chunks = [batched(shard_indices(index, number), batch_size) for number in own]
    batches = sweep(
        samples,
        list(chain.from_iterable(chunks)),
        num_workers,
        pin_memory=world.device.type == "cuda",
    )
    for turn in range(ceil(len(todo) / world.size)):
        if turn < len(own):
            parts = islice(batches, len(chunks[turn]))
            path = out / names[own[turn]]
            entries[path.name] = write_shard(path, parts, encoder, index, world, on_batch)
        world.barrier()  # who is done early would time out in the end
    return write_index(out, index, gathered(entries, world), world)


def share(items: Sequence[T], world: World) -> list[T]:
    """Those of this process: each has one item of `world.size` in a row, or one less."""
    return list(items[world.rank :: world.size])


def batched(indices: range, batch_size: int) -> list[range]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def shard_names(index: LatentIndex) -> list[str]:
    num = ceil(index.num_images / index.shard_size)
    return [f"shard-{number:05}.safetensors" for number in range(num)]


def shard_indices(index: LatentIndex, number: int) -> range:
    start = number * index.shard_size
    return range(start, min(start + index.shard_size, index.num_images))


def recorded_shards(out: Path, index: LatentIndex) -> dict[str, ShardEntry]:
    """Those of index.json, none without it. Raises ValueError where `out` has other latents."""
    shards: tuple[ShardEntry, ...] = ()
    if (out / INDEX_FILE).is_file():
        earlier = LatentIndex.read(out)
        require_same(out / INDEX_FILE, earlier.facts, index)
        shards = earlier.shards
    recorded = {entry.file: entry for entry in shards}
    for path in sorted(out.glob("shard-*.safetensors")):
        if path.name not in recorded:
            with suppress(DamagedError):
                require_same(path, read_facts(path), index)
    return recorded


def require_same(path: Path, facts: Mapping[str, Any], index: LatentIndex) -> None:
    for key, value in index.facts.items():
        if facts.get(key) != value:
            raise ValueError(
                f"{path} has {key} {facts.get(key)!r}, not {value!r}: give another folder, or "
                "remove it"
            )


def whole_shard(path: Path, recorded: ShardEntry | None) -> ShardEntry | None:
    """What lies there; None for nothing, and for what is not as it was recorded, or, where nothing
    was, not as long as its header says."""
    if not path.is_file():
        return None
    if recorded is not None:
        is_same = path.stat().st_size == recorded.num_bytes and file_sha256(path) == recorded.sha256
        return recorded if is_same else None
    try:
        facts = read_facts(path)
    except DamagedError:
        return None
    return ShardEntry(
        path.name, facts["num_rows"], facts["num_skipped"], path.stat().st_size, file_sha256(path)
    )


def warn_of_losses(out: Path, names: Sequence[str], recorded: Mapping[str, ShardEntry]) -> None:
    """Of these shards; those that no run has written yet are no loss."""
    lost = [
        f"{name} ({'damaged' if (out / name).exists() else 'missing'})"
        for name in names
        if name in recorded or (out / name).exists()
    ]
    if lost:
        logger.warning("%s: made again: %s", out, ", ".join(lost))


def write_shard(
    path: Path,
    batches: Iterator[Batch],
    encoder: ImageEncoder,
    index: LatentIndex,
    world: World,
    on_batch: OnBatch,
) -> ShardEntry:
    parts: dict[str, list[Tensor]] = {"latents": [], "class_labels": [], "indices": []}
    if index.has_flips:
        parts["flipped"] = []
    num_skipped = 0
    for batch in batches:
        num_skipped += batch.num_skipped
        if batch.images is not None:
            parts["indices"].append(batch.positions)
            parts["class_labels"].append(batch.class_labels)
            images = batch.images.to(world.device, non_blocking=True)
            for name, pixels in views(images, has_flips=index.has_flips):
                parts[name].append(encoder(pixels).to(DTYPES[index.dtype]).cpu())
        on_batch(len(batch) + batch.num_skipped)
    empty = {"latents": torch.empty(0, *index.latent_shape, dtype=DTYPES[index.dtype])}
    empty["flipped"] = empty["latents"]
    none = torch.empty(0, dtype=torch.int64)
    tensors = {
        name: torch.cat(found) if found else empty.get(name, none) for name, found in parts.items()
    }
    num_rows = len(tensors["indices"])
    facts = {**index.facts, "num_rows": num_rows, "num_skipped": num_skipped}
    sha256 = write_whole(path, tensors, facts)
    return ShardEntry(path.name, num_rows, num_skipped, path.stat().st_size, sha256)


def views(images: Tensor, *, has_flips: bool) -> list[tuple[str, Tensor]]:
    """Images as they are and, `flipped`, mirrored left to right."""
    return [("latents", images), *([("flipped", images.flip(-1))] if has_flips else [])]


def gathered(entries: dict[str, ShardEntry], world: World) -> dict[str, ShardEntry]:
    """Of all processes."""
    return {name: entry for part in world.gather(entries) for name, entry in part.items()}


def write_index(
    out: Path, index: LatentIndex, entries: dict[str, ShardEntry], world: World
) -> LatentIndex:
    index = replace(index, shards=tuple(entries[name] for name in shard_names(index)))
    if not any(entry.num_rows for entry in index.shards):
        raise ValueError(f"none of the {index.num_images} images can be read")
    if world.is_first:
        index.write(out)
    world.barrier()
    return index
