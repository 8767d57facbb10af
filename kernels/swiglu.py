"""The gated MLP's first half: silu(x·W1ᵀ + b1)·(x·W2ᵀ + b2), with the activation in the GEMM.

The rows of W1 and W2 lie interleaved, so one accumulator holds both halves of every pair, and only
the product of half the width is written. `pack_weights` alone makes that layout.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rae.kernels.dispatch import can_launch, select
from rae.kernels.lang import (
    TensorDescriptor,
    interprets,
    jit,
    narrow,
    operand,
    tl,
    triton,
    triton_dtype,
)

# The hidden size is padded to it: then every tile of weight rows is whole, and w3's K aligned.
HIDDEN_MULTIPLE = 128
# Descriptors take rows that start at multiples of as many bytes.
ALIGNMENT = 16
# Stands for a GPU's number of SMs where there is none: an H100's and H200's.
DEFAULT_SMS = 132


def swiglu(x: Tensor, weight: Tensor, bias: Tensor, kernels: str = "auto") -> Tensor:
    """silu(x·W1ᵀ + b1)·(x·W2ᵀ + b2).

    Args:
        x: (..., K), fp32 or bf16. Rows that lie at one stride are read in place.
        weight, bias: (2H, K) and (2H,) of `pack_weights`, contiguous, in x's dtype.
        kernels: "auto", "triton", "library" or "reference", as in `dispatch`. Triton takes a K of
            whole 16 bytes; "auto" leaves the others to the library.

    Returns:
        (..., H) in x's dtype.

    Raises ValueError for shapes, dtypes and layouts that are none of these.
    """
    return _swiglu(x, weight, bias, kernels)


def pack_weights(
    w12_weight: Tensor, w12_bias: Tensor, w3_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The published weights of a SwiGLU as `swiglu` and the linear layer after it take them.

    Args:
        w12_weight, w12_bias: (2h, K) and (2h,), [w1; w2].
        w3_weight: (D, h).

    Returns:
        (2H, K) and (2H,), whose row 2i is w1's row i and 2i + 1 is w2's, and (D, H). H is h, padded
        with zeros to a multiple of 128; silu(0)·0 = 0 meets w3's zeros, so the padding is exact.
    """
    hidden = w3_weight.shape[1]
    if w12_weight.shape[0] != 2 * hidden or w12_bias.shape != w12_weight.shape[:1]:
        shapes = tuple(w12_weight.shape), tuple(w12_bias.shape), tuple(w3_weight.shape)
        raise ValueError(f"w12 {shapes[0]}, its bias {shapes[1]} and w3 {shapes[2]} do not match")
    padding = -hidden % HIDDEN_MULTIPLE
    weight = F.pad(w12_weight.unflatten(0, (2, hidden)), (0, 0, 0, padding))  # (2, H, K)
    bias = F.pad(w12_bias.unflatten(0, (2, hidden)), (0, padding))
    return (
        weight.transpose(0, 1).flatten(0, 1).contiguous(),
        bias.T.flatten().contiguous(),
        F.pad(w3_weight, (0, padding)),
    )


@torch.library.custom_op("rae::swiglu", mutates_args=())
def _swiglu(x: Tensor, weight: Tensor, bias: Tensor, kernels: str) -> Tensor:
    check(x, weight, bias)
    dim, hidden = x.shape[-1], weight.shape[0] // 2
    if kernels == "auto" and not whole(dim, x.dtype):
        kernels = "library"
    rows = x.reshape(-1, dim)
    choice = select("swiglu", x, kernels, rows=len(rows), dim=dim, hidden=hidden)
    if choice.choice == "triton":
        out = launch(rows, weight, bias, **choice.config)
    elif choice.choice == "library":
        out = silu_mul(F.linear(rows, weight, bias))
    else:
        out = swiglu_ref(rows, weight, bias)
    return out.view(*x.shape[:-1], hidden)


@_swiglu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, kernels: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


def check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError for operands that the kernel would read wrongly."""
    rows, dim = weight.shape
    if x.shape[-1] != dim or x.stride(-1) != 1:
        raise ValueError(f"x {tuple(x.shape)} is not (..., {dim}) with contiguous rows")
    if rows % (2 * HIDDEN_MULTIPLE) or tuple(bias.shape) != (rows,):
        raise ValueError(
            f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} are not packed: (2H, K) "
            f"and (2H,), H a multiple of {HIDDEN_MULTIPLE}"
        )
    if not (weight.is_contiguous() and bias.is_contiguous()):
        raise ValueError("weight and bias are not contiguous")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype} and bias {bias.dtype}")


def whole(dim: int, dtype: torch.dtype) -> bool:
    return dim * dtype.itemsize % ALIGNMENT == 0


def swiglu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`rae::swiglu` in plain PyTorch, in fp32, or fp64 for an fp64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return silu_mul_ref(F.linear(x.to(wide), weight.to(wide), bias.to(wide))).to(x.dtype)


def silu_mul_ref(pairs: Tensor) -> Tensor:
    """silu(a)·b of `silu_mul` in plain PyTorch, in fp32, or fp64 for fp64 pairs."""
    wide = torch.promote_types(pairs.dtype, torch.float32)
    gate, up = pairs.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    return (F.silu(gate) * up).to(pairs.dtype)


def silu_mul(pairs: Tensor) -> Tensor:
    """silu(a)·b of the pairs (a, b) that lie side by side in (M, 2H), contiguous: (M, H)."""
    if pairs.is_cuda and can_launch("cuda"):
        return launch_silu_mul(pairs)
    return silu_mul_ref(pairs)


def launch_silu_mul(pairs: Tensor) -> Tensor:
    """`silu_mul` by the kernel."""
    rows, width = pairs.shape
    out = torch.empty(rows, width // 2, dtype=pairs.dtype, device=pairs.device)
    block = 2048
    _silu_mul_kernel[(triton.cdiv(out.numel(), block),)](
        pairs, out, out.numel(), DTYPE=triton_dtype(pairs.dtype), BLOCK=block, num_warps=4
    )
    return out


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    block_m: int,
    block_n: int,
    block_k: int,
    group_m: int,
    flatten: int,
    programs_per_sm: int,
    num_warps: int,
    num_stages: int,
) -> Tensor:
    """`rae::swiglu` of x (M, K) by the kernel.

    A tile is `block_m` rows of x times `block_n` rows of weight, hence `block_n` / 2 columns of the
    result; `group_m` tiles of rows share the weights that L2 holds. `flatten` (0 or 1) makes one
    loop of a program's tiles: the next tile's first loads run beside the activation.
    """
    (rows, dim), width = x.shape, weight.shape[0]
    if not whole(dim, x.dtype):
        raise ValueError(f"the kernel takes rows of whole {ALIGNMENT} bytes, not {dim} {x.dtype}")
    if not describable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    out = torch.empty(rows, width // 2, dtype=x.dtype, device=x.device)
    operands, in_kernel = (x, weight, out), makes_descriptors()
    if not in_kernel:
        blocks = [block_m, block_k], [block_n, block_k], [block_m, block_n // 2]
        operands = map(TensorDescriptor.from_tensor, operands, blocks)
    tiles = triton.cdiv(rows, block_m) * (width // block_n)
    _swiglu_kernel[(min(tiles, programs_per_sm * num_sms(x.device)),)](
        *operands,
        bias,
        rows,
        x.stride(0),
        MAKE_DESCRIPTORS=in_kernel,
        DIM=dim,
        WIDTH=width,
        DTYPE=triton_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=group_m,
        FLATTEN=bool(flatten),
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return out


def describable(x: Tensor) -> bool:
    """Whether a descriptor can read x (M, K) where it lies."""
    aligned = x.data_ptr() % ALIGNMENT == 0 and whole(x.stride(0), x.dtype)
    return aligned and x.stride(0) >= x.shape[1]


def makes_descriptors() -> bool:
    """Whether the kernel makes its descriptors: below sm_90 they are pointers, and only there the
    compiler knows how these are aligned, without which it copies 2 bytes at a time, in no pipeline.
    """
    if interprets():
        return False
    target: Any = triton.runtime.driver.active.get_current_target()
    return target.arch < 90


@cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return DEFAULT_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


@jit
def _silu_mul(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gate / (1 + tl.exp(-gate)) * up


@jit
def _silu_mul_kernel(
    pairs_ptr: tl.tensor,
    out_ptr: tl.tensor,
    size: tl.tensor,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = 2 * first + tl.arange(0, 2 * BLOCK)
    pairs = tl.load(pairs_ptr + pair, pair < 2 * size, other=0.0).to(tl.float32)
    gate, up = tl.split(pairs.reshape(BLOCK, 2))
    index = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, narrow(_silu_mul(gate, up), DTYPE), index < size)


@jit
def _described(
    matrix: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    MAKE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> tl.tensor_descriptor | tl.tensor:
    """`matrix`, or what describes the one it points to if `MAKE`: see `makes_descriptors`."""
    if MAKE:
        return tl.make_tensor_descriptor(
            matrix,
            [rows, columns],
            [stride, 1],  # type: ignore[list-item]
            [BLOCK_ROWS, BLOCK_COLUMNS],
        )
    else:
        return matrix


@jit
def _swiglu_kernel(
    x: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    out: tl.tensor_descriptor,
    bias_ptr: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    MAKE_DESCRIPTORS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
) -> None:
    x_desc = _described(x, rows, DIM, x_stride, MAKE_DESCRIPTORS, BLOCK_M, BLOCK_K)
    weight_desc = _described(weight, WIDTH, DIM, DIM, MAKE_DESCRIPTORS, BLOCK_N, BLOCK_K)
    out_desc = _described(
        out, rows, WIDTH // 2, WIDTH // 2, MAKE_DESCRIPTORS, BLOCK_M, BLOCK_N // 2
    )
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n: tl.constexpr = WIDTH // BLOCK_N
    start, tiles, step = tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)
    for tile in tl.range(start, tiles, step, flatten=FLATTEN):  # type: ignore[attr-defined]
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        group = min(tiles_m - first, GROUP_M)
        row = (first + tile % (GROUP_M * tiles_n) % group) * BLOCK_M
        block = tile % (GROUP_M * tiles_n) // group
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, DIM, BLOCK_K):  # type: ignore[attr-defined]
            x_block = operand(x_desc.load([row, k]))
            weight_block = operand(weight_desc.load([block * BLOCK_N, k]))
            acc = tl.dot(x_block, weight_block.T, acc, input_precision="ieee")
        bias = tl.load(bias_ptr + block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.float32)
        gate, up = tl.split((acc + bias).reshape(BLOCK_M, BLOCK_N // 2, 2))
        out_desc.store([row, block * (BLOCK_N // 2)], narrow(_silu_mul(gate, up), DTYPE))
