"""Random numbers that follow from a seed and a sample's position in the stream of training.

So no result depends on the number of processes, the micro-batch, the workers of a loader, or on
where a run was interrupted: there is no generator's state to keep.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(seed: int, *numbers: int) -> int:
    """A 63-bit seed of its own for each tuple of integers.

    Each number goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    state = 0
    for number in (seed, *numbers):
        state = (state ^ (number & MASK)) + GOLDEN & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device | str, seed: int, *numbers: int) -> torch.Generator:
    """A generator that `mix` seeds. On a CPU torch uses 32 bits of a seed."""
    return torch.Generator(device).manual_seed(mix(seed, *numbers))


def generators(
    device: torch.device | str, seed: int, positions: Tensor, purpose: int
) -> Iterable[torch.Generator]:
    """One for each of `positions` (B,); what is drawn for another `purpose` is independent.

    It is the same object, seeded anew: use one before asking for the next.
    """
    one = torch.Generator(device)
    for position in positions.tolist():
        yield one.manual_seed(mix(seed, position, purpose))
