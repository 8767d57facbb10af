"""Comparison with recorded numbers of the published implementation, in fp32 on the CPU.

An io file holds inputs and the outputs for them: of a DiT^DH `x`, `t`, `y`, and `shift` with
`num_steps` where there are trajectories; of a decoder `z` and `image`. An output's name says how
it was made: `v_null`, `v_cfg_1.5`, `euler_final`, `euler_autoguidance_1.42_interval_0_0.9`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rae.models.config import DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.models.guidance import Guidance
from rae.models.rae import RAE
from rae.models.sampling import denoise, guided_velocity, timesteps

FORWARD_BOUND = 1e-5
TRAJECTORY_BOUND = 1e-4

INPUTS = {"x", "t", "y", "shift", "num_steps", "cfg_interval"}
TRAINING = {"data", "train_xt", "train_loss"}  # compared by benchmarks/parity.py
OUTPUT = re.compile(
    r"(?P<kind>v|euler|heun2|midpoint)"
    r"(?:_(?P<null>null)|_(?P<final>final)|_step(?P<step>\d+))?"
    r"(?:_(?P<method>cfg|autoguidance)_(?P<scale>[\d.]+))?"
    r"(?P<interval>_interval(?:_(?P<low>[\d.]+)_(?P<high>[\d.]+))?)?"
)


class Result(NamedTuple):
    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN


def relative_error(output: Tensor, reference: Tensor) -> float:
    """‖output − reference‖ / ‖reference‖; infinite for another shape."""
    if output.shape != reference.shape:
        return float("inf")
    output, reference = output.double().cpu(), reference.double().cpu()
    return float((output - reference).norm() / reference.norm().clamp(min=1e-30))


@torch.no_grad()
def compare_dit_dh(model: DiTDH, guide: DiTDH | None, io: Mapping[str, Tensor]) -> Iterator[Result]:
    """Each recorded output of inference against ours. Raises ValueError for what cannot be
    compared."""
    require_inputs(io, model.config)
    null_label = model.config.null_label if model.config.has_null_label else None
    options: dict[str, Any] = {"null_label": null_label, "guide": guide}
    x, t, y = io["x"], io["t"], io["y"]
    grid = timesteps(int(io["num_steps"]), float(io["shift"])) if "shift" in io else torch.empty(0)
    for key in sorted(io.keys() - INPUTS - TRAINING):
        match = OUTPUT.fullmatch(key)
        if key == "grid":
            output, bound = grid, FORWARD_BOUND
        elif match is None:
            raise ValueError(f"unknown output {key!r}")
        elif match["kind"] == "v":
            labels = torch.full_like(y, model.config.null_label) if match["null"] else y
            output = guided_velocity(model, x, t, labels, read_guidance(match, io), **options)
            bound = FORWARD_BOUND
        else:
            points = grid[: int(match["step"]) + 1] if match["step"] else grid
            solver: Any = match["kind"]
            guidance = read_guidance(match, io)
            output = denoise(model, x, y, points, solver=solver, guidance=guidance, **options)
            bound = TRAJECTORY_BOUND
        yield Result(key, relative_error(output, io[key]), bound)


def require_inputs(io: Mapping[str, Tensor], config: DiTDHConfig) -> None:
    """Raises ValueError that names an input that is missing or another model's."""
    needed = {"x", "t", "y"}
    if any(key.startswith(("euler", "heun2", "midpoint", "grid")) for key in io):
        needed |= {"shift", "num_steps"}
    missing = needed - io.keys()
    if missing:
        raise ValueError(f"missing {', '.join(sorted(missing))}")
    batch = len(io["x"]) if io["x"].dim() else 0
    shapes = {"x": (batch, *config.latent_shape), "t": (batch,), "y": (batch,)}
    for key, shape in shapes.items():
        if tuple(io[key].shape) != shape:
            raise ValueError(f"{key} is {tuple(io[key].shape)}, this model takes {shape}")
    for key in ("x", "t"):
        if io[key].dtype != torch.float32:
            raise ValueError(f"{key} is {io[key].dtype}, not float32")
    last = config.num_classes - 1 + config.has_null_label
    if io["y"].dtype != torch.int64 or not ((io["y"] >= 0) & (io["y"] <= last)).all():
        raise ValueError(f"y {io['y'].tolist()} are not all classes from 0 to {last}")


def read_guidance(match: re.Match[str], io: Mapping[str, Tensor]) -> Guidance:
    low, high = 0.0, 1.0
    if match["low"]:
        low, high = float(match["low"]), float(match["high"])
    elif match["interval"]:
        if "cfg_interval" not in io:
            raise ValueError(f"missing cfg_interval for {match[0]}")
        low, high = io["cfg_interval"].tolist()
    method: Any = match["method"] or "cfg"
    return Guidance(float(match["scale"] or 1), (low, high), method)


@torch.no_grad()
def compare_decoder(rae: RAE, io: Mapping[str, Tensor]) -> Iterator[Result]:
    """The recorded image against ours. Raises ValueError for what cannot be compared."""
    missing = {"z", "image"} - io.keys()
    if missing:
        raise ValueError(f"missing {', '.join(sorted(missing))}")
    if io["z"].dtype != torch.float32:
        raise ValueError(f"z is {io['z'].dtype}, not float32")
    yield Result("image", relative_error(rae.decode(io["z"]), io["image"]), FORWARD_BOUND)
