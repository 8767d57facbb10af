"""Where the models run and in what arithmetic: names of flags to devices, dtypes and layers."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch
from torch import nn

from rae.kernels.dispatch import check_kernels
from rae.models.cpu import can_pack, pack
from rae.models.fused import fuse
from rae.models.layers import store_matmul_weights

Layers = Literal["fused", "packed", "plain"]

# Of the memory that is free once the models are there: what images that are paused may take, and
# the conditionings of one model.
SLOTS_SHARE = 1 / 32
CONDITIONING_SHARE = 1 / 64
CONDITIONING_BYTES = 2**31


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


def visible_devices(name: str) -> int:
    """Of the kind that `resolve_device` finds. Raises ValueError as that does."""
    return torch.cuda.device_count() if resolve_device(name).type == "cuda" else 1


def share_cores(num_processes: int) -> None:
    """Leave the other processes of this machine their share of its cores."""
    if num_processes > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))


def resolve_precision(name: str, device: torch.device) -> tuple[str, torch.dtype]:
    """The precision's name and its matmuls' dtype; "auto" is bf16 where the device multiplies it
    faster than fp32. Raises ValueError for another name, and for tf32 elsewhere than on CUDA."""
    dtypes = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
    if name == "auto":
        name = "bf16" if device.type == "cuda" or has_fast_bf16(device) else "fp32"
    if name not in dtypes:
        raise ValueError(f"precision {name!r} is not one of auto, {', '.join(dtypes)}")
    if name == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' takes a CUDA GPU, not {device.type!r}: fp32 or bf16")
    return name, dtypes[name]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether this is a CPU with avx512_bf16: XL takes 443 ms a forward there, 792 in fp32."""
    return device.type == "cpu" and can_pack() and torch.cpu._is_avx512_bf16_supported()


def set_matmul_precision(name: str) -> None:
    """TF32 is a setting of the process: the authors' scripts turn it on, fp32 here is fp32."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")


def prepare(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = "auto",
    attention: str = "auto",
    *,
    compiles: bool = False,
) -> Layers:
    """Bring a model's layers to the form that runs fastest on `device`, its matmul weights in
    `dtype`: the kernels' on CUDA or where `kernels` asks for them, oneDNN's on a CPU, which
    torch.compile does not take. The model then runs, and can be neither saved nor trained.

    Raises ValueError for kernels that cannot run.
    """
    check_kernels(kernels, attention, device)
    if device.type == "cuda" or kernels in ("triton", "reference"):
        fuse(model, dtype, kernels, kernels if attention == "auto" else attention)
        return "fused"
    if device.type == "cpu" and can_pack() and not compiles:
        pack(model, dtype)
        return "packed"
    store_matmul_weights(model, dtype)
    return "plain"


def free_bytes(device: torch.device) -> int:
    """Of the device's memory; on a CPU half of the machine's is taken for free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class DeviceUse(NamedTuple):
    """Of a GPU, by all processes; `watts` is None where NVML does not say."""

    memory_used: int
    memory_total: int
    watts: float | None


def device_use(device: torch.device) -> DeviceUse | None:
    """None on a CPU, and for a GPU that does not answer."""
    if device.type != "cuda":
        return None
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return None
    return DeviceUse(total - free, total, power_watts(device))


def power_watts(device: torch.device) -> float | None:
    """None without the nvml extra, and where NVML fails, as it may in a container."""
    try:
        return torch.cuda.power_draw(device) / 1000
    except Exception:  # NVMLError is a class of an optional library; a gauge is worth no failure
        return None


def conditioning_bytes(device: torch.device) -> int:
    """For conditionings that come again: with XL in bf16 at most those of 112 labels."""
    return min(CONDITIONING_BYTES, int(CONDITIONING_SHARE * free_bytes(device)))


def num_slots(device: torch.device, slot_bytes: int, max_rows: int) -> int:
    """How many images may be in the middle of their evaluations: as many as a step's rows, and
    paused ones up to 16 times that in a share of the free memory."""
    affordable = int(SLOTS_SHARE * free_bytes(device)) // slot_bytes
    return max(max_rows, min(16 * max_rows, affordable))
