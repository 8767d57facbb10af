"""Run the frozen encoder once over a data set, and keep its latents (`LatentShards`).

A shard is a range of the images' numbers, so what is in it depends on no process and no earlier
run: a run that was killed goes on with the shards that are not there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from math import ceil
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rae.models.tensor_files import file_sha256
from rae.training.batch import Batch
from rae.training.data.image_encoder import ImageEncoder
from rae.training.data.latent_shards import INDEX_FILE, LatentIndex, ShardEntry
from rae.training.data.samples import Samples
from rae.training.data.stream import sweep
from rae.training.data.tensor_writing import read_facts, write_whole
from rae.training.distributed import World

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
    """Write the shards of `index` that are not in `out` yet, then index.json; returns it whole.

    `samples` yield images without random parts. `on_batch` gets the number of images that are
    done, in this process. Raises ValueError for a folder of other latents and for data of which
    nothing is readable, OSError for a full disk: the shards that are there stay.
    """
    out.mkdir(parents=True, exist_ok=True)
    world.barrier()
    whole = finished(out, index)
    world.barrier()  # until here nobody writes: all have found the same
    names = shard_names(index)
    if len(whole) == len(names) and (out / INDEX_FILE).is_file():
        return LatentIndex.read(out)
    entries = {name: hashed(out / name) for name in share(sorted(whole), world)}
    on_batch(sum(entry.num_rows for entry in entries.values()))
    todo = [number for number, name in enumerate(names) if name not in whole]
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


def finished(out: Path, index: LatentIndex) -> set[str]:
    """Names of the shards that an earlier run wrote. Raises ValueError for another run's."""
    wanted = index.facts
    for path in sorted(out.glob("shard-*.safetensors")):
        facts = read_facts(path)
        for key, value in wanted.items():
            if facts.get(key) != value:
                raise ValueError(
                    f"{path} has {key} {facts.get(key)!r}, not {value!r}: give another folder, or "
                    "remove it"
                )
    return {name for name in shard_names(index) if (out / name).is_file()}


def hashed(path: Path) -> ShardEntry:
    """Of a shard of an earlier run."""
    facts = read_facts(path)
    return ShardEntry(
        path.name, facts["num_rows"], facts["num_skipped"], path.stat().st_size, file_sha256(path)
    )


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
