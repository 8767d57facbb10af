"""Latents to pixels beside the steps: on a stream of its own, to pinned memory, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from rae.models.rae import RAE
from rae.models.sampling import to_uint8
from rae.server.graphs import Buckets, Replayed
from rae.server.memory import memory_errors


class NonFiniteError(Exception):
    """Images of `slots` hold NaN or infinity."""

    def __init__(self, slots: Sequence[int]) -> None:
        super().__init__(f"the images in slots {', '.join(map(str, slots))} are not finite")
        self.slots = slots


class Decoding:
    """A batch of images on its way from the device."""

    def __init__(
        self,
        slots: Sequence[int],
        parts: Sequence[tuple[Tensor, Tensor]],
        arrived: torch.cuda.Event | None,
    ) -> None:
        self._slots, self._parts, self._arrived = slots, parts, arrived

    def finite(self) -> list[bool]:
        """Whether each image is, in the order of the slots; waits for the device."""
        self._wait()
        return [fine for _, finite in self._parts for fine in finite.tolist()]

    @memory_errors()
    def images(self, *, must_be_finite: bool = False) -> list[np.ndarray]:
        """(H, W, 3) uint8 each, in the order of the slots; waits for the device.

        With `must_be_finite` raises NonFiniteError; without, uint8 hides what is not. Raises
        NoMemoryError.
        """
        self._wait()
        if must_be_finite:
            pairs = zip(self._slots, self.finite(), strict=True)
            broken = [slot for slot, fine in pairs if not fine]
            if broken:
                raise NonFiniteError(broken)
        # Copies: pinned memory is scarce, and comes back when these parts are let go.
        return [image.copy() for images, _ in self._parts for image in images.numpy()]

    def _wait(self) -> None:
        if self._arrived is not None:
            self._arrived.synchronize()


class ImageDecoder:
    """The RAE's decoder for latents (n, N, C) of any n, in batches of at most the largest bucket.

    What it is given may be overwritten as soon as `decode` returns, in the order of the stream.
    """

    def __init__(
        self,
        rae: RAE,
        device: torch.device,
        buckets: Buckets,
        autocast: Callable[[], AbstractContextManager[object]],
        *,
        captures: bool,
    ) -> None:
        config = rae.decoder.config
        self.buckets = buckets
        self._rae, self._device, self._autocast = rae, device, autocast
        self._grid, self._tokens = config.grid, config.grid**2
        shape = (buckets.largest, self._tokens, config.latent_channels)
        self._latents = torch.zeros(shape, device=device)
        self.rows = Replayed(self._evaluate, device, captures=captures)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _evaluate(self, rows: int) -> Tensor:
        """Images (rows, 3, H, W), unclamped, fp32."""
        latents = self._latents[:rows].transpose(1, 2).unflatten(-1, (self._grid, self._grid))
        with self._autocast():
            return self._rae.decode(latents)

    def decode(self, slots: Sequence[int], latents: Tensor, *, truncate: bool) -> Decoding:
        """Start on `latents` (n, N, C), those of `slots`; pixels are rounded, or truncated."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            latents.record_stream(stream)
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            batches = latents.split(self.buckets.largest)
            parts = [self._decode_batch(batch, truncate) for batch in batches]
            arrived = torch.cuda.Event() if stream is not None else None
            if arrived is not None:
                arrived.record()
        return Decoding(slots, parts, arrived)

    def _decode_batch(self, latents: Tensor, truncate: bool) -> tuple[Tensor, Tensor]:
        count = len(latents)
        self._latents[:count] = latents
        images = self.rows(self.buckets(count))[:count]
        # The latents too: a decoder might turn an infinity into a colour.
        finite = images.isfinite().flatten(1).all(1) & latents.isfinite().flatten(1).all(1)
        pixels = to_uint8(images, truncate=truncate).permute(0, 2, 3, 1)
        return self._to_host(pixels.contiguous()), self._to_host(finite)

    def _to_host(self, x: Tensor) -> Tensor:
        if x.device.type != "cuda":
            return x.cpu()
        return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
