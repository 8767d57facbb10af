"""The norm site of a block: residual + gate·y, RMSNorm, modulate, in one pass over memory.

An eager block makes 7 passes there (arXiv 2510.11690's code, `DDTEncBlock.forward`), each over
the whole stream. Here x and y are read once, the new residual and the activations written once;
shift, scale and gate are read in place, wherever they lie in the (B, 1 or N, 6D) modulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae.kernels.dispatch import select
from rae.kernels.lang import jit, narrow, tl, triton, triton_dtype


def adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    norm: str = "rms",
    dtype: torch.dtype,
    kernels: str = "auto",
) -> Tensor:
    """norm(x)·(1 + scale) + shift: the first site of a stream.

    Args:
        x: (B, N, D), the residual, fp32 or bf16; the last dimension is contiguous, also below.
        shift, scale: (B, 1, D) or (B, N, D), views of one tensor with the same strides.
        weight: (D,) of the norm, or None.
        norm: "rms" or "layer"; both over D, with `eps`, computed in fp32.
        dtype: of the result.
        kernels: "auto", "triton", "library" or "reference", as in `dispatch`.

    Returns:
        (B, N, D) in `dtype`.

    Raises ValueError for shapes and layouts that are none of these.
    """
    return _adaln(x, None, None, weight, shift, scale, eps, norm, False, dtype, kernels)[0]


def residual_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    norm: str = "rms",
    dtype: torch.dtype,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x' = x + gate·y, and `adaln` of it: a site between two layers.

    As `adaln`; y is (B, N, D), gate (B, 1, D) or (B, N, D). Returns x' in x's dtype and the
    activations in `dtype`, which are made of x' before it is rounded.
    """
    stream, out = _adaln(x, y, gate, weight, shift, scale, eps, norm, True, dtype, kernels)
    return stream, out


def last_adaln(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    norm: str = "rms",
    dtype: torch.dtype,
    kernels: str = "auto",
) -> Tensor:
    """`residual_adaln` at a stream's end: the residual is not written."""
    return _adaln(x, y, gate, weight, shift, scale, eps, norm, False, dtype, kernels)[0]


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, kernels: str = "auto") -> Tensor:
    """x + gate·y (B, N, D) in x's dtype, where no norm follows. As `residual_adaln`."""
    return _adaln(x, y, gate, None, None, None, 0.0, "none", True, x.dtype, kernels)[0]


@torch.library.custom_op("rae::adaln", mutates_args=())
def _adaln(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    keep: bool,
    dtype: torch.dtype,
    kernels: str,
) -> list[Tensor]:
    """The new residual if `keep`, then the activations unless norm is "none"."""
    check(x, y, gate, weight, shift, scale, norm)
    rows, dim = x.shape[0] * x.shape[1], x.shape[2]
    selection = select("adaln", x, kernels, rows=rows, dim=dim)
    if selection.choice == "triton":
        config = selection.config
        return launch(x, y, gate, weight, shift, scale, eps, norm, keep, dtype, **config)
    return adaln_ref(x, y, gate, weight, shift, scale, eps, norm, keep, dtype)


@_adaln.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    keep: bool,
    dtype: torch.dtype,
    kernels: str,
) -> list[Tensor]:
    residual = [torch.empty_like(x, memory_format=torch.contiguous_format)] if keep else []
    return residual + ([] if norm == "none" else [x.new_empty(x.shape, dtype=dtype)])


def check(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: str,
) -> None:
    """Raises ValueError for operands that the kernel would read wrongly."""
    if norm not in ("rms", "layer", "none"):
        raise ValueError(f"norm {norm!r} is not one of rms, layer, none")
    if x.dim() != 3:
        raise ValueError(f"x {tuple(x.shape)} is not (B, N, D)")
    batch, tokens, dim = x.shape
    rows = {"gate": gate, "shift": shift, "scale": scale}
    for name, value in {"x": x, "y": y, **rows}.items():
        if value is None:
            continue
        if value.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{name} is {value.dtype}: float32 and bfloat16 are known")
        if value.stride(-1) != 1 and dim > 1:
            raise ValueError(f"the last dimension of {name} {tuple(value.shape)} is not contiguous")
        allowed = [(batch, tokens, dim)] + [(batch, 1, dim)] * (name in rows)
        if tuple(value.shape) not in allowed:
            raise ValueError(f"{name} {tuple(value.shape)} for x {tuple(x.shape)}")
    if shift is not None and scale is not None and shift.stride() != scale.stride():
        raise ValueError(f"strides of shift {shift.stride()} and scale {scale.stride()} differ")
    if weight is not None and (tuple(weight.shape) != (dim,) or not weight.is_contiguous()):
        raise ValueError(f"weight {tuple(weight.shape)} is not ({dim},) and contiguous")


def adaln_ref(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    keep: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """`rae::adaln` in plain PyTorch, in fp32, or fp64 for an fp64 x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    stream = x.to(wide)
    if y is not None and gate is not None:
        stream = stream + gate.to(wide) * y.to(wide)
    kept = [stream.to(x.dtype, copy=True)] if keep else []
    if shift is None or scale is None:
        return kept
    if norm == "layer":
        stream = stream - stream.mean(-1, keepdim=True)
    out = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight.to(wide)
    return [*kept, (out * (1 + scale.to(wide)) + shift.to(wide)).to(dtype)]


def launch(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
    norm: str,
    keep: bool,
    dtype: torch.dtype,
    *,
    block_rows: int,
    num_warps: int,
) -> list[Tensor]:
    """`rae::adaln` by the kernel: `block_rows` rows to a program of `num_warps` warps."""
    batch, tokens, dim = x.shape
    has_norm = norm != "none"
    residual = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if has_norm else None
    rows = batch * tokens
    _adaln_kernel[(triton.cdiv(rows, block_rows),)](
        x,
        y,
        gate,
        weight,
        shift,
        scale,
        residual,
        out,
        rows,
        *x.stride()[:2],
        *row_strides(y),
        *row_strides(gate),
        *row_strides(scale),
        TOKENS=tokens,
        DIM=dim,
        EPS=eps,
        NORM=norm,
        RESIDUAL_DTYPE=triton_dtype(x.dtype),
        DTYPE=triton_dtype(dtype),
        BLOCK_ROWS=block_rows,
        BLOCK_DIM=triton.next_power_of_2(dim),
        num_warps=num_warps,
    )
    return [tensor for tensor in (residual, out) if tensor is not None]


def row_strides(x: Tensor | None) -> tuple[int, int]:
    """Strides over samples and tokens; over tokens 0 where there is one row per sample."""
    if x is None:
        return 0, 0
    return x.stride(0), x.stride(1) if x.shape[1] > 1 else 0


@jit
def _adaln_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    x_batch: tl.tensor,
    x_token: tl.tensor,
    y_batch: tl.tensor,
    y_token: tl.tensor,
    gate_batch: tl.tensor,
    gate_token: tl.tensor,
    mod_batch: tl.tensor,
    mod_token: tl.tensor,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    EPS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL_DTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    dim = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (row < rows) & (dim < DIM)
    sample, token = row // TOKENS, row % TOKENS
    x = tl.load(x_ptr + sample * x_batch + token * x_token + dim, mask, other=0.0)
    x = x.to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + sample * y_batch + token * y_token + dim, mask, other=0.0)
        gate = tl.load(gate_ptr + sample * gate_batch + token * gate_token + dim, mask, other=0.0)
        x += gate.to(tl.float32) * y.to(tl.float32)
    if residual_ptr is not None:
        tl.store(residual_ptr + row * DIM + dim, narrow(x, RESIDUAL_DTYPE), mask)
    if NORM != "none":  # no early return: what follows one is compiled, too, without its operands
        if NORM == "layer":
            x = tl.where(mask, x - tl.sum(x, axis=1, keep_dims=True) / DIM, 0.0)
        h = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / DIM + EPS)
        if weight_ptr is not None:
            h *= tl.load(weight_ptr + dim, dim < DIM, other=0.0).to(tl.float32)
        modulation = sample * mod_batch + token * mod_token + dim
        scale = tl.load(scale_ptr + modulation, mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + modulation, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * DIM + dim, narrow(h * (1 + scale) + shift, DTYPE), mask)
