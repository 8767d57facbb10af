"""One model on rows that name slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch import Tensor

from rae.models.dit_dh import Conditioning, DiTDH
from rae.server.conditioning import ConditioningCache, Key
from rae.server.graphs import Replayed


class Evaluation:
    """Velocities of `rows`: `rows(n)` gives (n, N, C) of the first n that `inputs` describe.

    Args:
        inputs: slots, labels, t and kept, each (capacity,) on the device, as `Descriptors` reads.
        cache: from which conditionings are gathered, or None to evaluate them at every step.
    """

    def __init__(
        self,
        model: DiTDH,
        latents: Tensor,
        inputs: Mapping[str, Tensor],
        cache: ConditioningCache | None,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        captures: bool,
    ) -> None:
        self.cache = cache
        self._model, self._latents, self._inputs = model, latents, inputs
        self._autocast = autocast
        self.rows = Replayed(self._evaluate, latents.device, captures=captures)

    def keep(self, keys: Iterable[Key]) -> None:
        """Evaluate at once what an image will need, as far as there is room."""
        if self.cache is not None:
            self.cache.rows(list(keys)[: self.cache.capacity])

    def describe(
        self,
        rows: Sequence[tuple[int, int, float]],
        write: Mapping[str, np.ndarray],
        prefix: str,
    ) -> None:
        """Write (slot, label, t) of each row to the host's side of the descriptors."""
        for name, values in zip(("slots", "labels", "t"), zip(*rows, strict=True), strict=True):
            write[prefix + name][: len(rows)] = values
        if self.cache is not None:
            write[prefix + "kept"][: len(rows)] = self.cache.rows([row[1:] for row in rows])

    def _evaluate(self, rows: int) -> Tensor:
        """In the dtype of the last matmul."""
        slots = self._inputs["slots"][:rows]
        with self._autocast():
            return self._model.velocity(self._latents[slots], self._conditioning(rows))

    def _conditioning(self, rows: int) -> Conditioning:
        if self.cache is not None:
            return self.cache.gather(self._inputs["kept"][:rows])
        return self._model.condition(self._inputs["t"][:rows], self._inputs["labels"][:rows])
