"""Bytes of a training step, from configurations: what stays, and what a backward needs.

Counted as eager PyTorch keeps them, with fused attention: a compiled step keeps less.
"""

from __future__ import annotations

from dataclasses import dataclass

from rae.models.config import DecoderConfig, DiTConfig, DiTDHConfig
from rae.training.distributed import Strategy
from rae.training.planning.flops import VGG16, ModelConfig, ViTShape, mlp_hidden
from rae.training.precision import Precision

FP32, BF16 = 4, 2


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """Bytes that one process keeps of `num_parameters` trained weights."""

    weights: int
    gradients: int
    moments: int
    ema: int
    working: int
    """Copies: DDP's buckets, or FSDP's two gathered blocks, and autocast's weights in bf16."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.ema + self.working


def state_memory(
    num_parameters: int,
    largest_block: int,
    *,
    world_size: int,
    strategy: Strategy,
    precision: Precision,
) -> StateMemory:
    """Weights, gradients, both moments and EMA in fp32; FSDP shards them over all processes.

    `largest_block` is the number of weights that FSDP gathers at a time; it has the next one's
    under way.
    """
    shards = world_size if strategy == "fsdp" else 1
    own = -(-num_parameters // shards) * FP32
    working = num_parameters * BF16 if precision == "bf16" else 0
    if world_size > 1:
        working += 2 * largest_block * FP32 if strategy == "fsdp" else own
    return StateMemory(weights=own, gradients=own, moments=2 * own, ema=own, working=working)


def activation_bytes(config: ModelConfig, precision: Precision) -> int:
    """What one image's forward keeps for its backward."""
    low = BF16 if precision == "bf16" else FP32
    if isinstance(config, DecoderConfig):
        return _decoder_bytes(config, low)
    return (
        _dit_dh_bytes(config, low) if isinstance(config, DiTDHConfig) else _dit_bytes(config, low)
    )


def _dit_dh_bytes(config: DiTDHConfig, low: int) -> int:
    dim, head_dim = config.hidden_size, config.head_hidden_size
    block = _block_bytes(config, dim, config.num_heads, low, fp32_stream=config.use_pos_embed)
    head = _block_bytes(config, head_dim, config.head_num_heads, low, fp32_stream=False)
    # Per token: 1 + scale of two norms and the modulation of each head block.
    head += 8 * head_dim * low
    final = _norm_bytes(config, head_dim, low, fp32_stream=False) + head_dim * low
    joint = (2 * config.latent_channels + dim + 2 * head_dim) * low + dim * FP32
    per_token = config.depth * block + config.head_depth * head + final + joint
    return config.num_tokens * per_token + 8 * config.depth * dim * low


def _dit_bytes(config: DiTConfig, low: int) -> int:
    dim = config.hidden_size
    block = _block_bytes(config, dim, config.num_heads, low, fp32_stream=True)
    final = _norm_bytes(config, dim, low, fp32_stream=True)
    per_token = config.depth * block + final + config.latent_channels * low
    return config.latent_size**2 * per_token + (8 * config.depth + 1) * dim * low


def _block_bytes(
    config: DiTDHConfig | DiTConfig, dim: int, num_heads: int, low: int, *, fp32_stream: bool
) -> int:
    """Of one token, without modulations: they may be its own or its image's."""
    norms = 2 * _norm_bytes(config, dim, low, fp32_stream=fp32_stream)
    hidden = mlp_hidden(config, dim)
    mlp = (4 if config.use_swiglu else 2) * hidden * low
    attention = 6 * dim * low + num_heads * FP32  # qkv, rotated q and k, output; log-sum-exp
    if config.use_qknorm and config.use_rmsnorm:
        attention += 2 * dim * (low if low == FP32 else low + FP32) + 2 * num_heads * FP32
    gates = 2 * dim * low
    return norms + attention + mlp + gates


def _norm_bytes(config: DiTDHConfig | DiTConfig, dim: int, low: int, *, fp32_stream: bool) -> int:
    """Of one token in a norm and its modulation: what the norm sees (RMSNorm in fp32, then
    before and after its weight), and what the linear after it takes."""
    stream = FP32 if fp32_stream else low
    if not config.use_rmsnorm:
        return dim * (2 * stream + low) + 2 * FP32
    return dim * (2 * FP32 + stream + low) + FP32


def _decoder_bytes(config: DecoderConfig, low: int) -> int:
    tokens = config.grid**2 + 1
    layers = config.depth * _vit_layer_bytes(
        config.hidden_size, config.intermediate_size, config.num_heads, low
    )
    last = config.hidden_size * (FP32 + low)
    return tokens * (layers + last) + config.grid**2 * config.latent_channels * low


def _vit_layer_bytes(dim: int, inner: int, num_heads: int, low: int) -> int:
    """Of one token. Autocast makes a copy of a norm's result for each of q, k and v."""
    inputs = (2 if low == FP32 else 4) * dim * low
    attention = 4 * dim * low + num_heads * FP32
    return 2 * dim * FP32 + 4 * FP32 + inputs + attention + 2 * inner * low


def lpips_bytes(image_size: int) -> int:
    """What a backward through VGG16 to one reconstruction needs, in fp32. A pooling keeps its
    result and indices of 8 bytes."""
    total, channels, side = 0, 3, image_size
    for width in VGG16:
        if width is None:
            side //= 2
            total += channels * side**2 * (FP32 + 8)
        else:
            channels = width
            total += channels * side**2 * FP32
    return total + tapped_bytes(image_size)


def tapped_bytes(image_size: int) -> int:
    """Differences of the five layers' features."""
    widths = (64, 128, 256, 512, 512)
    return FP32 * sum(width * (image_size // 2**level) ** 2 for level, width in enumerate(widths))


def frozen_vit_bytes(shape: ViTShape) -> int:
    """What a backward through a frozen transformer to one image needs, in fp32."""
    layer = 6 * shape.hidden_size + shape.intermediate_size + shape.num_heads + 4
    return shape.num_tokens * (shape.depth * layer + shape.hidden_size) * FP32
