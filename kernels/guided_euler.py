"""Guidance and the Euler update, straight on the slots: one pass over the rows of a step.

v = v_weak + scale·(v − v_weak) for a row that has a weaker branch, then latents[slot] += dt·v, in
fp32. A row's branches are paired by index, so that rows with and without guidance, by CFG and by
AutoGuidance, share a batch (the semantics are `models/sampling.py`'s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rae.kernels.dispatch import select
from rae.kernels.lang import jit, tl, triton


def guided_euler(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None = None,
    *,
    kernels: str = "auto",
) -> None:
    """Advance `latents` in place by one Euler step of n rows.

    Args:
        latents: (S, ...) fp32, the slots' latents.
        slots: (n,) int64, the slot of each row; distinct, or -1 for a row that only pads.
        dt: (n,) fp32, t_next − t, so negative.
        velocity: (R, ...) fp32 or bf16, R >= n; the rows' own come first, in their order. Copied
            where it is not contiguous.
        weak_rows: (n,) int64, where a row's weaker velocity is: a row of `velocity`, R + a row of
            `guide_velocity`, or -1 for a row without guidance.
        scales: (n,) fp32, guidance scales; not read where weak_rows is -1.
        guide_velocity: (G, ...) as `velocity`, or None.
        kernels: "auto", "triton", "library" or "reference", as in `dispatch`.

    Raises ValueError for shapes, layouts and dtypes that are none of these.
    """
    velocity = velocity.contiguous()  # a model's is a view of its tokens
    guide_velocity = None if guide_velocity is None else guide_velocity.contiguous()
    _guided_euler(latents, slots, dt, velocity, weak_rows, scales, guide_velocity, kernels)


@torch.library.custom_op("rae::guided_euler", mutates_args=("latents",))
def _guided_euler(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None,
    kernels: str,
) -> None:
    check(latents, slots, dt, velocity, weak_rows, scales, guide_velocity)
    if not len(slots):
        return
    size = latents[0].numel()
    selection = select("guided_euler", velocity, kernels, rows=len(slots), size=size)
    operands = (latents, slots, dt, velocity, weak_rows, scales, guide_velocity)
    if selection.choice == "triton":
        launch(*operands, **selection.config)
    else:
        guided_euler_ref(*operands)


@_guided_euler.register_fake
def _(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None,
    kernels: str,
) -> None:
    return None


def check(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None,
) -> None:
    """Raises ValueError for operands that the kernel would read wrongly."""
    rows = {"slots": slots, "dt": dt, "weak_rows": weak_rows, "scales": scales}
    for name, value in rows.items():
        dtype = torch.int64 if name in ("slots", "weak_rows") else torch.float32
        if tuple(value.shape) != tuple(slots.shape) or value.dim() != 1 or value.dtype != dtype:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not {dtype} (n,)")
    if latents.dtype != torch.float32:
        raise ValueError(f"latents are {latents.dtype}: the state is float32")
    velocities = {"velocity": velocity, "guide_velocity": guide_velocity}
    for name, value in {"latents": latents, **rows, **velocities}.items():
        if value is not None and not value.is_contiguous():
            raise ValueError(f"{name} {tuple(value.shape)} is not contiguous")
    for name, value in velocities.items():
        if value is None:
            continue
        if value.shape[1:] != latents.shape[1:]:
            raise ValueError(f"{name} {tuple(value.shape)} for latents {tuple(latents.shape)}")
        if value.dtype not in (torch.float32, torch.bfloat16) or value.dtype != velocity.dtype:
            raise ValueError(f"{name} is {value.dtype}: both are float32, or both bfloat16")
    if len(velocity) < len(slots):
        raise ValueError(f"velocity has {len(velocity)} rows for {len(slots)} slots")


def guided_euler_ref(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None,
) -> None:
    """`guided_euler` in plain PyTorch: the same operations as `sampling.denoise`."""
    rows = velocity if guide_velocity is None else torch.cat([velocity, guide_velocity])
    strong, ones = velocity[: len(slots)].to(latents.dtype), (1,) * (latents.dim() - 1)
    pairs = (weak_rows >= 0).nonzero().flatten()
    weak = rows[weak_rows[pairs]].to(latents.dtype)
    guided = weak + scales[pairs].view(-1, *ones) * (strong[pairs] - weak)
    step = dt.view(-1, *ones) * strong.index_copy(0, pairs, guided)
    kept = slots >= 0
    latents[slots[kept]] = latents[slots[kept]] + step[kept]


def launch(
    latents: Tensor,
    slots: Tensor,
    dt: Tensor,
    velocity: Tensor,
    weak_rows: Tensor,
    scales: Tensor,
    guide_velocity: Tensor | None,
    *,
    block: int,
    num_warps: int,
) -> None:
    """`guided_euler` by the kernel: `block` elements to a program of `num_warps` warps."""
    size = latents[0].numel()
    _guided_euler_kernel[(triton.cdiv(size, block), len(slots))](
        latents,
        slots,
        dt,
        velocity,
        weak_rows,
        scales,
        guide_velocity,
        len(velocity),
        SIZE=size,
        BLOCK=block,
        num_warps=num_warps,
    )


@jit
def _guided_euler_kernel(
    latents_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    dt_ptr: tl.tensor,
    velocity_ptr: tl.tensor,
    weak_rows_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    guide_ptr: tl.tensor,
    num_velocities: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < SIZE
    v = tl.load(velocity_ptr + row * SIZE + element, mask, other=0.0).to(tl.float32)
    weak_row = tl.load(weak_rows_ptr + row)
    if weak_row >= 0:
        weak = tl.load(
            velocity_ptr + weak_row * SIZE + element,
            mask & (weak_row < num_velocities),
            other=0.0,
        ).to(tl.float32)
        if guide_ptr is not None:
            guide_row = weak_row - num_velocities
            weak += tl.load(
                guide_ptr + guide_row * SIZE + element, mask & (guide_row >= 0), other=0.0
            ).to(tl.float32)
        v = weak + tl.load(scales_ptr + row) * (v - weak)
    latents = tl.load(latents_ptr + slot * SIZE + element, mask, other=0.0)
    latents += tl.load(dt_ptr + row) * v
    tl.store(latents_ptr + slot * SIZE + element, latents, mask)
