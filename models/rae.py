"""The representation autoencoder: normalised latents to images, and back where there is an encoder.

Source: github bytetriper/RAE, `src/stage1/rae.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rae.models.config import DecoderConfig
from rae.models.decoder import Decoder
from rae.models.encoder import Encoder, encode_images, encoder_pixels


class RAE(nn.Module):
    """`decode` (and `encode`) between latents (B, C, h, w) and images (B, 3, H, W) in [0, 1].

    `latents_mean` may be absent, as in the released DINOv2-B file; `latents_var` is kept rather
    than the std, so that an export is exact.
    """

    latents_mean: Tensor | None
    latents_var: Tensor
    eps: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        config: DecoderConfig,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        has_mean: bool = True,
    ) -> None:
        super().__init__()
        shape = (config.latent_channels, config.grid, config.grid)
        self.decoder = Decoder(config)
        self.encoder: Encoder | None = None
        self.register_buffer("latents_mean", torch.zeros(shape) if has_mean else None)
        self.register_buffer("latents_var", torch.ones(shape))
        self.register_buffer("eps", torch.tensor(1e-5))
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            value = torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
            self.register_buffer(name, value, persistent=False)

    @property
    def latents_std(self) -> Tensor:
        return torch.sqrt(self.latents_var + self.eps)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), unclamped, fp32. Raises ValueError for another latent shape."""
        config = self.decoder.config
        expected = (config.latent_channels, config.grid, config.grid)
        if tuple(latents.shape[1:]) != expected:
            raise ValueError(f"latents {tuple(latents.shape[1:])}; this decoder takes {expected}")
        z = latents * self.latents_std
        if self.latents_mean is not None:
            z = z + self.latents_mean
        pixels = self.decoder(z.flatten(2).transpose(1, 2)).float()
        return pixels * self.image_std + self.image_mean

    @torch.no_grad()
    def encode_raw(self, images: Tensor) -> Tensor:
        """The encoder's tokens as latents (B, C, h, w), before the statistics' normalisation.

        Images are resized to the encoder's size, bicubic without antialias. Raises ValueError
        where no encoder is loaded.
        """
        if self.encoder is None:
            raise ValueError("this checkpoint has no encoder: images can be decoded only")
        return encode_images(self.encoder, images, self.image_mean, self.image_std)

    def encoder_pixels(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] in the encoder's size and normalisation."""
        assert self.encoder is not None
        return encoder_pixels(self.encoder, images, self.image_mean, self.image_std)

    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]."""
        return self.normalise(self.encode_raw(images))

    def normalise(self, latents: Tensor) -> Tensor:
        """By the statistics, of latents (B, C, h, w) as the encoder gives them."""
        if self.latents_mean is not None:
            latents = latents - self.latents_mean
        return latents / self.latents_std
