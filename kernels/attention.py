"""Attention on the packed qkv projection, with the 2-D rotation of q and k inside.

Eager code reads q and k, writes them rotated and reads them again: as much traffic again as
attention's own, and at 256 tokens traffic is the floor. The kernel rotates them in registers: q
once, k once per query block. A head of 72 is 64 + 16 lanes of the matrix units, where the
next power of two is 128.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae.kernels.dispatch import Choice, select
from rae.kernels.lang import jit, narrow, operand, tl, triton, triton_dtype

ALLOWED = ("auto", *get_args(Choice))
# The order in which "library" tries them; the others are SDPA with that backend alone.
BACKENDS = {
    "library": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
}


def attention(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, *, kernels: str = "auto"
) -> Tensor:
    """softmax(rot(q)·rot(k)ᵀ/√d)·v, without a mask; no gradient.

    Args:
        qkv: (B, N, 3·H·d), fp32 or bf16, the last dimension (3, H, d) and contiguous; d is even.
        num_heads: H.
        cos, sin: (N, d) fp32, of pairs (x0, x1) that turn to (x0·cos - x1·sin, x1·cos + x0·sin);
            None for no rotation. Rotated q and k are rounded to qkv's dtype.
        kernels: "auto", "triton", "library" or "reference", as in `dispatch`, or a library by
            name: "cudnn", "flash" (both through SDPA), "flash-attn".

    Returns:
        (B, N, H·d) in qkv's dtype.

    Raises ValueError for operands that are none of these, and where `kernels` cannot run.
    """
    return _attention(qkv, num_heads, cos, sin, kernels)


@torch.library.custom_op("rae::attention", mutates_args=())
def _attention(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, kernels: str
) -> Tensor:
    check(qkv, num_heads, cos, sin, kernels)
    batch, tokens, head_dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    selection = select(
        "attention", qkv, kernels, rows=batch * num_heads, tokens=tokens, head_dim=head_dim
    )
    if selection.choice == "triton":
        return launch(qkv, num_heads, cos, sin, **selection.config)
    if selection.choice == "reference":
        return attention_ref(qkv, num_heads, cos, sin)
    return attention_library(qkv, num_heads, cos, sin, selection.choice)


@_attention.register_fake
def _(qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, kernels: str) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


def check(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, kernels: str
) -> None:
    """Raises ValueError for operands that the kernels would read wrongly."""
    if kernels not in ALLOWED:
        raise ValueError(f"kernels {kernels!r} is not one of {', '.join(ALLOWED)}")
    if qkv.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"qkv is {qkv.dtype}: float32 and bfloat16 are known")
    if num_heads < 1:
        raise ValueError(f"num_heads {num_heads} is not positive")
    if qkv.dim() != 3 or qkv.shape[2] % (3 * num_heads) or not qkv.numel():
        raise ValueError(f"qkv {tuple(qkv.shape)} is not (B, N, 3·{num_heads}·d)")
    if qkv.stride(2) != 1:
        raise ValueError(f"the last dimension of qkv {tuple(qkv.shape)} is not contiguous")
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table is None:
            continue
        if tuple(table.shape) != (qkv.shape[1], head_dim) or table.dtype != torch.float32:
            raise ValueError(
                f"{name} {tuple(table.shape)} {table.dtype} is not "
                f"({qkv.shape[1]}, {head_dim}) torch.float32"
            )
        if not table.is_contiguous():
            raise ValueError(f"{name} {tuple(table.shape)} is not contiguous")


def attention_ref(qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`rae::attention` in plain PyTorch, in fp32, or fp64 for an fp64 qkv."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.unflatten(-1, (3, num_heads, -1))  # (B, N, 3, H, d)
    if cos is not None and sin is not None:
        heads = torch.cat([rotate(heads[:, :, :2], cos, sin), heads[:, :, 2:]], dim=2)
    q, k, v = heads.to(wide).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    with torch.autocast(qkv.device.type, enabled=False):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2).to(qkv.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, 2, H, d) turned by tables (N, d), in fp32 or wider, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = torch.stack((-wide[..., 1::2], wide[..., 0::2]), dim=-1).flatten(-2)
    return (wide * cos[:, None, None] + turned * sin[:, None, None]).to(x.dtype)


def attention_library(
    qkv: Tensor, num_heads: int, cos: Tensor | None, sin: Tensor | None, name: str
) -> Tensor:
    """`rae::attention` as one pass of rotation and a library's attention, a name of `Choice`."""
    heads = qkv.unflatten(-1, (3, num_heads, -1))  # (B, N, 3, H, d)
    q, k, v = heads.unbind(2)  # (B, N, H, d)
    if cos is not None and sin is not None:
        on_gpu = qkv.device.type == "cuda"
        rotated = launch_rope(heads, cos, sin) if on_gpu else rotate(heads[:, :, :2], cos, sin)
        q, k = rotated.unbind(2)
    if name == "flash-attn":
        return flash_attn(q, k, v).flatten(2).contiguous()
    # SDPA's result has the order of q's strides, which may be tokens before samples.
    return sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), name).contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """PyTorch's attention on (B, H, N, d) by the backends of `name`; (B, N, H·d).

    Raises ValueError where the one that is asked for cannot run.
    """
    if name != "library":
        can_use = {"cudnn": can_use_cudnn_attention, "flash": can_use_flash_attention}[name]
        params = SDPAParams(q, k, v, None, 0.0, False, False)
        if q.device.type != "cuda" or not can_use(params):
            raise ValueError(
                f"kernels {name!r} cannot run here: PyTorch refuses it for {q.dtype} "
                f"{tuple(q.shape)} on {q.device.type!r}; 'library' takes what can run"
            )
    if q.device.type != "cuda":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(BACKENDS[name], set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash_attn package's attention on (B, N, H, d). Raises ValueError without it."""
    try:
        package = import_module("flash_attn")
    except ImportError as error:
        raise ValueError(
            "kernels 'flash-attn' needs a package: pip install 'rae-server[flash-attn]'"
        ) from error
    return package.flash_attn_func(q, k, v)


def launch(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Tensor:
    """`rae::attention` by the kernel: `block_m` queries to a program, `block_n` keys at a time.

    `maxnreg` bounds a thread's registers: at 128, two programs of 8 warps share a multiprocessor.
    """
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    main, rest = lanes(head_dim)
    out = torch.empty((batch, tokens, width // 3), dtype=qkv.dtype, device=qkv.device)
    _attention_kernel[(triton.cdiv(tokens, block_m) * batch * num_heads,)](
        qkv,
        cos,
        sin,
        out,
        qkv.stride(0),
        STRIDE=qkv.stride(1),
        TOKENS=tokens,
        HEADS=num_heads,
        HEAD_DIM=head_dim,
        MAIN=main,
        REST=rest,
        SCALE=math.log2(math.e) / math.sqrt(head_dim),
        DTYPE=triton_dtype(qkv.dtype),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        LAST=max(16, triton.next_power_of_2(tokens % block_n)) if tokens % block_n else 0,
        num_warps=num_warps,
        num_stages=num_stages,
        maxnreg=maxnreg,
    )
    return out


def lanes(head_dim: int) -> tuple[int, int]:
    """Two powers of two that hold a head, at least the 16 of a product; the second may be 0."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    return main, max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@jit
def _rows(
    x_ptr: tl.tensor,
    row: tl.tensor,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    END: tl.constexpr,
) -> tl.tensor:
    """LANES lanes of a head's rows; zeros beyond its end, and from row END on unless END is 0."""
    lane = FIRST + tl.arange(0, LANES)[None, :]
    x_ptr += row[:, None] * STRIDE + lane
    if END:
        return tl.load(x_ptr, (row[:, None] < END) & (lane < HEAD_DIM), other=0.0)
    if FIRST + LANES > HEAD_DIM:
        return tl.load(x_ptr, lane < HEAD_DIM, other=0.0)
    return tl.load(x_ptr)


@jit
def _turn(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, ROWS: tl.constexpr, LANES: tl.constexpr
) -> tl.tensor:
    """fp32 x (ROWS, LANES) turned in interleaved pairs.

    The tables hold each pair's angle twice. Both are used: with one alone, ptxas splits the
    16-byte loads of a table into 4-byte ones (sm_90, Triton 3.8).
    """
    x0, x1 = tl.split(tl.reshape(x, (ROWS, LANES // 2, 2)))
    return x * cos + tl.reshape(tl.join(-x1, x0), (ROWS, LANES)) * sin


@jit
def _turned_rows(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    row: tl.tensor,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LANES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    END: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    x = _rows(x_ptr, row, STRIDE, FIRST, LANES, HEAD_DIM, END)
    if cos_ptr is not None:
        cos = _rows(cos_ptr, row, HEAD_DIM, FIRST, LANES, HEAD_DIM, END)
        sin = _rows(sin_ptr, row, HEAD_DIM, FIRST, LANES, HEAD_DIM, END)
        x = narrow(_turn(x.to(tl.float32), cos, sin, ROWS, LANES), DTYPE)
    return operand(x)


@jit
def _attend(
    q: tl.tensor,
    q_rest: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    acc_rest: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    start: tl.tensor,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    END: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The online softmax over BLOCK keys from `start`. All loads come before the products."""
    token = start + tl.arange(0, BLOCK)
    v = operand(_rows(v_ptr, token, STRIDE, 0, MAIN, HEAD_DIM, END))
    k = _turned_rows(
        k_ptr, cos_ptr, sin_ptr, token, STRIDE, 0, MAIN, HEAD_DIM, END, BLOCK, DTYPE
    )  # fmt: skip
    v_rest, k_rest = v, k
    if REST:
        v_rest = operand(_rows(v_ptr, token, STRIDE, MAIN, REST, HEAD_DIM, END))
        k_rest = _turned_rows(
            k_ptr, cos_ptr, sin_ptr, token, STRIDE, MAIN, REST, HEAD_DIM, END, BLOCK, DTYPE
        )
    scores = tl.dot(q, k.T, input_precision="ieee")
    if REST:
        scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
    if END:
        scores = tl.where(token[None, :] < END, scores, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    total = total * decay + tl.sum(weights, 1)
    weights = operand(narrow(weights, DTYPE))
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision="ieee")
    if REST:
        acc_rest = tl.dot(weights, v_rest, acc_rest * decay[:, None], input_precision="ieee")
    return new_maximum, total, acc, acc_rest


@jit
def _attention_kernel(
    qkv_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    qkv_batch: tl.tensor,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,
) -> None:
    QUERY_BLOCKS: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    QUERY_END: tl.constexpr = TOKENS * (TOKENS % BLOCK_M != 0)
    FULL: tl.constexpr = TOKENS // BLOCK_N * BLOCK_N
    sample = (tl.program_id(0) // (QUERY_BLOCKS * HEADS)).to(tl.int64)
    head = tl.program_id(0) // QUERY_BLOCKS % HEADS
    token = tl.program_id(0) % QUERY_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = qkv_ptr + sample * qkv_batch + head * HEAD_DIM
    k_ptr, v_ptr = q_ptr + HEADS * HEAD_DIM, q_ptr + 2 * HEADS * HEAD_DIM
    q = _turned_rows(
        q_ptr, cos_ptr, sin_ptr, token, STRIDE, 0, MAIN, HEAD_DIM, QUERY_END, BLOCK_M, DTYPE
    )
    q_rest = q
    if REST:
        q_rest = _turned_rows(
            q_ptr, cos_ptr, sin_ptr, token, STRIDE, MAIN, REST, HEAD_DIM, QUERY_END, BLOCK_M, DTYPE
        )
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_rest = tl.zeros((BLOCK_M, REST if REST else 16), tl.float32)
    for start in range(0, FULL, BLOCK_N):
        maximum, total, acc, acc_rest = _attend(
            q, q_rest, maximum, total, acc, acc_rest, k_ptr, v_ptr, cos_ptr, sin_ptr, start,
            STRIDE, HEAD_DIM, MAIN, REST, SCALE, DTYPE, BLOCK_N, 0,
        )  # fmt: skip
    if LAST:
        maximum, total, acc, acc_rest = _attend(
            q, q_rest, maximum, total, acc, acc_rest, k_ptr, v_ptr, cos_ptr, sin_ptr, FULL,
            STRIDE, HEAD_DIM, MAIN, REST, SCALE, DTYPE, LAST, TOKENS,
        )  # fmt: skip
    factor = 1 / total[:, None]
    out_ptr += (sample * TOKENS + token[:, None]) * (HEADS * HEAD_DIM) + head * HEAD_DIM
    lane = tl.arange(0, MAIN)[None, :]
    mask = (token[:, None] < TOKENS) & (lane < HEAD_DIM)
    tl.store(out_ptr + lane, narrow(acc * factor, DTYPE), mask)
    if REST:
        lane = MAIN + tl.arange(0, REST)[None, :]
        mask = (token[:, None] < TOKENS) & (lane < HEAD_DIM)
        tl.store(out_ptr + lane, narrow(acc_rest * factor, DTYPE), mask)


def launch_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k (B, N, 2, H, d), rotated, of heads (B, N, 3, H, d); each token's are contiguous."""
    batch, tokens, _, num_heads, head_dim = heads.shape
    out = torch.empty(
        (batch, tokens, 2, num_heads, head_dim), dtype=heads.dtype, device=heads.device
    )
    _rope_kernel[(batch * tokens,)](
        heads,
        cos,
        sin,
        out,
        *heads.stride()[:2],
        TOKENS=tokens,
        ROWS=2 * num_heads,
        HEAD_DIM=head_dim,
        DTYPE=triton_dtype(heads.dtype),
        BLOCK_ROWS=triton.next_power_of_2(2 * num_heads),
        LANES=triton.next_power_of_2(head_dim),
        num_warps=4,
    )
    return out


@jit
def _rope_kernel(
    x_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    sample = (tl.program_id(0) // TOKENS).to(tl.int64)
    token = tl.program_id(0) % TOKENS
    row = tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, LANES)[None, :]
    x_ptr += sample * x_batch + token * x_token
    x = _rows(x_ptr, row, HEAD_DIM, 0, LANES, HEAD_DIM, ROWS).to(tl.float32)
    cos = tl.load(cos_ptr + token * HEAD_DIM + lane, lane < HEAD_DIM, other=0.0)
    sin = tl.load(sin_ptr + token * HEAD_DIM + lane, lane < HEAD_DIM, other=0.0)
    out_ptr += (sample * TOKENS + token) * (ROWS * HEAD_DIM) + row[:, None] * HEAD_DIM + lane
    mask = (row[:, None] < ROWS) & (lane < HEAD_DIM)
    tl.store(out_ptr, narrow(_turn(x, cos, sin, BLOCK_ROWS, LANES), DTYPE), mask)
