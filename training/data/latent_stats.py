"""One pass over a data set, or over its encoded latents, for their statistics."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch

from rae.training.data.encode import batched, share, views
from rae.training.data.image_encoder import ImageEncoder
from rae.training.data.latent_shards import LatentShards
from rae.training.data.samples import Samples
from rae.training.data.stats import LatentStatistics
from rae.training.data.stream import sweep
from rae.training.distributed import World

MEET_EVERY = 64  # batches


class MeasuredLatents(NamedTuple):
    statistics: LatentStatistics
    num_skipped: int


def measure_images(
    samples: Samples,
    encoder: ImageEncoder,
    world: World,
    *,
    has_flips: bool,
    batch_size: int,
    num_workers: int,
    on_batch: Callable[[int], None],
) -> MeasuredLatents:
    """Of the latents of every image, and with `has_flips` of its mirror image, once.

    The same in each process. Raises ValueError where no image can be read.
    """
    chunks = batched(range(len(samples)), batch_size)
    own = share(chunks, world)
    batches = sweep(samples, own, num_workers, pin_memory=world.device.type == "cuda")
    statistics, num_skipped = LatentStatistics(), 0
    for turn in range(ceil(len(chunks) / world.size)):
        batch = next(batches, None)  # the last turn may be without
        if batch is not None:
            num_skipped += batch.num_skipped
            if batch.images is not None:
                images = batch.images.to(world.device, non_blocking=True)
                for _, pixels in views(images, has_flips=has_flips):
                    statistics.update(encoder(pixels))
            on_batch(len(batch) + batch.num_skipped)
        if turn % MEET_EVERY == 0:
            world.barrier()  # who is done early would time out in the end
    total = statistics.over(world, encoder.latent_shape)
    if not total.count:
        raise ValueError(f"none of the {len(samples)} images can be read")
    return MeasuredLatents(total, int(world.sum(torch.tensor(num_skipped, device=world.device))))


def measure_shards(
    shards: LatentShards,
    world: World,
    *,
    has_flips: bool,
    batch_size: int,
    on_batch: Callable[[int], None],
) -> MeasuredLatents:
    """Of all latents of a folder, and with `has_flips` of the mirrored images'. The same in each
    process. Raises ValueError for latents without flips, and for a shard of another sha256."""
    if has_flips and not shards.index.has_flips:
        raise ValueError(f"{shards.folder} has no latents of mirror images")
    statistics = LatentStatistics()
    entries = shards.index.shards
    own = share(range(len(entries)), world)
    for turn in range(ceil(len(entries) / world.size)):
        for number in own[turn : turn + 1]:  # the last turn may be without
            shards.verify(number)
            for latents in shards.chunks(number, batch_size, has_flips=has_flips):
                statistics.update(latents.to(world.device))
            on_batch(entries[number].num_rows)
        world.barrier()  # who is done early would time out in the end
    total = statistics.over(world, shards.index.latent_shape)
    return MeasuredLatents(total, sum(entry.num_skipped for entry in entries))
