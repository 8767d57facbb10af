"""Tensors on one device: slots, rows, decode. Knows nothing of requests that wait."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from rae.kernels.dispatch import check_kernels, selected
from rae.kernels.guided_euler import guided_euler
from rae.models.checkpoint import Checkpoint
from rae.models.config import GuidanceMethod, Solver
from rae.models.cpu import can_pack, pack
from rae.models.fused import fuse
from rae.models.layers import store_matmul_weights
from rae.models.sampling import Guidance, denoise, draw_noise, timesteps, to_uint8
from rae.server.request import ImageSpec, Plan


class NonFiniteError(Exception):
    """Images of `slots` hold NaN or infinity."""

    def __init__(self, slots: Sequence[int]) -> None:
        super().__init__(f"the images in slots {', '.join(map(str, slots))} are not finite")
        self.slots = slots


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The first of cuda, mps, cpu that is there for "auto". ValueError for one that is not.

    `local_rank` counts the processes that share a machine's GPUs, each of which takes its own.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if name not in available:
        raise ValueError(f"device {name!r} is not one of auto, {', '.join(available)}")
    if not available[name]:
        usable = ", ".join(device for device, there in available.items() if there)
        raise ValueError(f"device {name!r} is not available on this machine; available: {usable}")
    if name == "cuda" and local_rank is not None:
        return torch.device(name, local_rank % torch.cuda.device_count())
    return torch.device(name)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """bf16 on CUDA, else fp32 for "auto". Raises ValueError for another name."""
    precisions = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name not in precisions:
        raise ValueError(f"precision {name!r} is not one of auto, {', '.join(precisions)}")
    return precisions[name]


Layers = Literal["fused", "packed", "plain"]


def prepare(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
    attention: str = "auto",
) -> Layers:
    """Bring a model's layers to the form that runs fastest on `device`, its matmul weights in
    `dtype`: the kernels' on CUDA or where `kernels` asks for them, oneDNN's on a CPU. The model
    then runs, and can be neither saved nor trained. Raises ValueError for kernels that cannot run.
    """
    check_kernels(kernels, attention, device)
    if device.type == "cuda" or kernels in ("triton", "reference"):
        fuse(model, dtype, kernels, kernels if attention == "auto" else attention)
        return "fused"
    if device.type == "cpu" and can_pack():
        pack(model, dtype)
        return "packed"
    store_matmul_weights(model, dtype)
    return "plain"


class Runner:
    """One image per slot, in fp32. A row is one evaluation of the model for one slot: with CFG a
    guided slot takes a second row of the model, with AutoGuidance one of the guide."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: torch.dtype,
        num_slots: int,
        kernels: str = "auto",
        attention: str = "auto",
    ) -> None:
        config = checkpoint.config
        self.config = config
        self.device = device
        self.precision = precision
        self.kernels = kernels
        self.dit_dh = checkpoint.dit_dh.to(device)
        self.guide = checkpoint.guide.to(device) if checkpoint.guide else None
        self.rae = checkpoint.rae.to(device)
        sizes = checkpoint.num_parameters
        self._guide_cost = sizes.get("guide", 0) / sizes["dit_dh"]
        for model in (self.dit_dh, self.guide, self.rae):
            if model is not None:
                self.layers = prepare(model, device, precision, kernels, attention)
        self.latents = torch.zeros(num_slots, *config.dit_dh.latent_shape, device=device)
        self._slots: dict[int, tuple[ImageSpec, Plan]] = {}
        self._cached_plan = lru_cache(maxsize=1024)(self._make_plan)

    def plan(self, spec: ImageSpec) -> Plan:
        """The plan of an image; the null label has no use for CFG, whose branches would agree."""
        is_null = spec.class_label == self.config.dit_dh.null_label
        off = spec.guidance_method == "cfg" and is_null
        return self._cached_plan(
            spec.steps, 1.0 if off else spec.cfg, spec.guidance_interval, spec.guidance_method
        )

    def _make_plan(
        self, steps: int, cfg: float, interval: tuple[float, float], method: GuidanceMethod
    ) -> Plan:
        grid = timesteps(steps, self.config.shift)
        guidance = Guidance(cfg, interval, method)
        guided = tuple(guidance.active(grid[:-1]).tolist())
        second = self._guide_cost if method == "autoguidance" else 1.0
        falling = accumulate((1 + second * flag for flag in reversed(guided)), initial=0.0)
        return Plan(
            times=tuple(grid.tolist()),
            scale=cfg,
            method=method,
            guided=guided,
            costs=tuple(falling)[::-1],
        )

    def start(self, slot: int, spec: ImageSpec) -> None:
        """Put an image's noise into a slot."""
        self.latents[slot] = draw_noise(self.config.dit_dh.latent_shape, [spec.seed])[0]
        self._slots[slot] = (spec, self.plan(spec))

    @torch.inference_mode()
    def step(self, rows: Sequence[tuple[int, int]]) -> None:
        """One evaluation and Euler update for each (slot, step) of `rows`; slots are distinct."""
        slots = torch.tensor([slot for slot, _ in rows], device=self.device)
        specs, plans = zip(*(self._slots[slot] for slot, _ in rows), strict=True)
        ends = torch.tensor(
            [p.times[i : i + 2] for p, (_, i) in zip(plans, rows, strict=True)], dtype=torch.float32
        )
        t, t_next = ends.to(self.device).unbind(1)
        labels = torch.tensor([spec.class_label for spec in specs], device=self.device)
        scales = torch.tensor([plan.scale for plan in plans], device=self.device)
        guided = [p.method if p.guided[i] else "" for p, (_, i) in zip(plans, rows, strict=True)]
        velocity, guide_velocity, weak_rows = self._velocities(slots, t, labels, guided)
        guided_euler(
            self.latents,
            slots,
            t_next - t,
            velocity,
            weak_rows,
            scales.float(),
            guide_velocity,
            kernels=self.kernels,
        )

    @torch.inference_mode()
    def solve(self, slots: Sequence[int], solver: Solver) -> None:
        """Denoise `slots`, which share a plan, by `sampling.denoise`: `step` knows only euler."""
        specs, plans = zip(*(self._slots[slot] for slot in slots), strict=True)
        assert all(plan is plans[0] for plan in plans)
        indices = torch.tensor(slots, device=self.device)
        with torch.autocast(self.device.type, self.precision, enabled=self.autocasts):
            self.latents[indices] = denoise(
                self.dit_dh,
                self.latents[indices],
                torch.tensor([spec.class_label for spec in specs], device=self.device),
                torch.tensor(plans[0].times),
                solver=solver,
                guidance=Guidance(plans[0].scale, specs[0].guidance_interval, plans[0].method),
                null_label=self.config.dit_dh.null_label,
                guide=self.guide,
            )

    def _velocities(
        self, slots: Tensor, t: Tensor, labels: Tensor, guided: list[str]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """One evaluation of the model for all rows, null label's last, one of the guide, and
        where each row's weaker velocity is, as `guided_euler` takes it."""
        latents, null_label = self.latents[slots], self.config.dit_dh.null_label
        cfg, auto = (self._indices(guided, method) for method in ("cfg", "autoguidance"))
        weak_rows = torch.full_like(slots, -1)
        pairs = torch.cat([cfg, auto])
        weak_rows[pairs] = len(slots) + torch.arange(len(pairs), device=self.device)
        with torch.autocast(self.device.type, self.precision, enabled=self.autocasts):
            velocity = self.dit_dh(
                torch.cat([latents, latents[cfg]]),
                torch.cat([t, t[cfg]]),
                torch.cat([labels, torch.full_like(cfg, null_label)]),
            )
            if self.guide is None or not len(auto):
                return velocity, None, weak_rows
            return velocity, self.guide(latents[auto], t[auto], labels[auto]), weak_rows

    @property
    def implementations(self) -> dict[str, list[str]]:
        """What ran so far, by op and shape: "triton", "library", ..."""
        return selected() if self.layers == "fused" else {}

    @property
    def autocasts(self) -> bool:
        return self.precision != torch.float32

    def _indices(self, guided: list[str], method: str) -> Tensor:
        indices = [row for row, name in enumerate(guided) if name == method]
        return torch.tensor(indices, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def decode(
        self, slots: Sequence[int], *, truncate: bool = False, must_be_finite: bool = False
    ) -> list[np.ndarray]:
        """Images (H, W, 3) uint8 of the latents in `slots`, rounded, or truncated as published.

        With `must_be_finite` raises NonFiniteError; without, uint8 hides what is not.
        """
        latents = self.latents[torch.tensor(slots, device=self.device)]
        with torch.autocast(self.device.type, self.precision, enabled=self.autocasts):
            images = self.rae.decode(latents)
        if must_be_finite:
            # The latents too: a decoder might turn an infinity into a colour.
            finite = images.isfinite().flatten(1).all(1) & latents.isfinite().flatten(1).all(1)
            broken = [slot for slot, fine in zip(slots, finite.tolist(), strict=True) if not fine]
            if broken:
                raise NonFiniteError(broken)
        return list(to_uint8(images, truncate=truncate).permute(0, 2, 3, 1).cpu().numpy())
