"""Floating-point operations of the networks that are trained and run, from their configurations.

A multiplication and an addition are two. Matrix products, attention and convolutions count, as
in `torch.utils.flop_counter`; what a kernel computes twice (attention's backward) counts once, so
that the figures are the model's and not an implementation's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from rae.models.config import DecoderConfig, DiTConfig, DiTDHConfig, EncoderConfig, EncoderKind
from rae.models.decoder import Decoder
from rae.models.dit import DiT
from rae.models.dit_dh import DiTDH

ModelConfig = DiTDHConfig | DiTConfig | DecoderConfig

NUM_FREQUENCIES = 256

# Of a VGG16 with 3×3 convolutions: widths, None where the sides are halved.
VGG16 = (64, 64, None, 128, 128, None, *(256,) * 3, None, *(512,) * 3, None, *(512,) * 3)
DISCRIMINATOR_KERNEL = 9


@dataclass(frozen=True)
class Flops:
    """Of one image. A backward is twice the forward, less the gradient of what is not trained:
    latents, times, labels."""

    forward: int
    backward: int

    @property
    def step(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class ViTShape:
    """A vision transformer as encoders are: a patch embedding, blocks, and no more.

    `num_extra_tokens` are the class token and registers.
    """

    image_size: int
    patch_size: int
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    num_extra_tokens: int = 0

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.num_extra_tokens


# The base sizes that the published models encode 256 px with; 512 px have twice the sides.
ENCODERS: dict[EncoderKind, ViTShape] = {
    "dinov2": ViTShape(image_size=224, patch_size=14, num_extra_tokens=5),
    "siglip2": ViTShape(image_size=256, patch_size=16),
    "mae": ViTShape(image_size=256, patch_size=16, num_extra_tokens=1),
}
# The DINO ViT-S/8 of the published discriminator.
DINO = ViTShape(
    image_size=224,
    patch_size=8,
    hidden_size=384,
    num_heads=6,
    intermediate_size=1536,
    num_extra_tokens=1,
)


def encoder_shape(encoder: EncoderConfig) -> ViTShape:
    """Of the base size, which all published recipes have."""
    return replace(ENCODERS[encoder.kind], image_size=encoder.image_size)


def model_flops(config: ModelConfig) -> Flops:
    """Of a module that is trained."""
    if isinstance(config, DiTDHConfig):
        return dit_dh_flops(config)
    return dit_flops(config) if isinstance(config, DiTConfig) else decoder_flops(config)


def dit_dh_flops(config: DiTDHConfig) -> Flops:
    dim, head_dim = config.hidden_size, config.head_hidden_size
    num_tokens, channels = config.num_tokens, config.latent_channels
    block, head_block = (block_macs(config, width) for width in (dim, head_dim))
    per_sample = dim * dim + config.depth * 6 * dim * dim  # t_embedder's second linear, adaLN
    per_token = (
        config.depth * block
        + (dim * head_dim if dim != head_dim else 0)
        + config.head_depth * (head_block + 6 * head_dim * head_dim)
        + 2 * head_dim * head_dim
        + head_dim * channels
    )
    first = 2 * NUM_FREQUENCIES * dim + num_tokens * channels * (dim + head_dim)
    return _flops(per_sample + num_tokens * per_token, first)


def dit_flops(config: DiTConfig) -> Flops:
    """Of the plain baseline: the last layer's adaLN is per sample, too."""
    dim, channels, num_tokens = config.hidden_size, config.latent_channels, config.latent_size**2
    per_sample = dim * dim + config.depth * 6 * dim * dim + 2 * dim * dim
    per_token = config.depth * block_macs(config, dim) + dim * channels
    first = 2 * NUM_FREQUENCIES * dim + num_tokens * channels * dim
    return _flops(per_sample + num_tokens * per_token, first)


def block_macs(config: DiTDHConfig | DiTConfig, dim: int) -> int:
    """Multiplications of one token in one block, without adaLN."""
    hidden = mlp_hidden(config, dim)
    mlp = (3 if config.use_swiglu else 2) * hidden * dim
    return 4 * dim * dim + 2 * config.latent_size**2 * dim + mlp


def mlp_hidden(config: DiTDHConfig | DiTConfig, dim: int) -> int:
    """5461 at width 2048: the MLP of DiT^DH's head is odd."""
    width = int(dim * config.mlp_ratio)
    return int(2 / 3 * width) if config.use_swiglu else width


def decoder_flops(config: DecoderConfig) -> Flops:
    """The class token runs through every layer, decoder_pred too."""
    dim, num_tokens = config.hidden_size, config.grid**2 + 1
    layer = 4 * dim * dim + 2 * num_tokens * dim + 2 * dim * config.intermediate_size
    per_token = config.depth * layer + dim * 3 * config.patch_size**2
    return _flops(num_tokens * per_token, config.grid**2 * config.latent_channels * dim)


def encoder_flops(shape: ViTShape) -> int:
    """A forward. SigLIP2's pooling head is left out: nobody reads its result."""
    dim = shape.hidden_size
    layer = 4 * dim * dim + 2 * shape.num_tokens * dim + 2 * dim * shape.intermediate_size
    patches = shape.num_patches * 3 * shape.patch_size**2 * dim
    return 2 * (patches + shape.depth * shape.num_tokens * layer)


def lpips_flops(image_size: int) -> Flops:
    """VGG16 on the reconstruction and on the image; the backward ends at the reconstruction."""
    macs, channels, side = 0, 3, image_size
    for width in VGG16:
        if width is None:
            side //= 2
        else:
            macs += 9 * channels * width * side**2
            channels = width
    return Flops(forward=4 * macs, backward=2 * macs)


def discriminator_flops(trunk: ViTShape, num_heads: int) -> tuple[Flops, Flops]:
    """Of its own update, on an image and a reconstruction, and of the decoder's adversarial term,
    on a reconstruction whose gradient is taken. The trunk is frozen, the heads on its patches
    learn."""
    frozen, dim = encoder_flops(trunk), trunk.hidden_size
    heads = 2 * trunk.num_patches * num_heads * head_parameters(dim)
    first = 2 * trunk.num_patches * num_heads * dim * dim
    update = Flops(forward=2 * (frozen + heads), backward=2 * (2 * heads - first))
    return update, Flops(forward=frozen + heads, backward=frozen + heads)


def head_parameters(dim: int) -> int:
    """Of three convolutions, without biases."""
    return dim * dim + DISCRIMINATOR_KERNEL * dim * dim + dim


def _flops(macs: int, first_macs: int) -> Flops:
    """`first_macs` are of the layers whose input needs no gradient."""
    return Flops(forward=2 * (macs + first_macs), backward=2 * (2 * macs + first_macs))


def num_parameters(config: ModelConfig) -> int:
    """Those that are trained; tables of positions and frequencies are not."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


def on_meta(config: ModelConfig) -> nn.Module:
    """The module without its weights' memory."""
    with torch.device("meta"):
        if isinstance(config, DiTDHConfig):
            return DiTDH(config)
        return DiT(config) if isinstance(config, DiTConfig) else Decoder(config)


def encoder_parameters(shape: ViTShape) -> int:
    """Of blocks and the patch embedding; tables of positions, 0.1 %, are left out."""
    dim, inner = shape.hidden_size, shape.intermediate_size
    layer = 4 * dim * dim + 2 * dim * inner + 9 * dim + inner
    return shape.depth * layer + 3 * shape.patch_size**2 * dim
