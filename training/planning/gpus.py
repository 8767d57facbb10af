"""What GPUs can do at most, by their vendor's datasheets: for MFU and for plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rae.training.distributed import World
from rae.training.run_settings import Precision, Strategy

RESERVE_BYTES = 2 * 2**30
"""Of a GPU: the CUDA context, cuBLAS' and NCCL's buffers."""
FRAGMENTATION = 0.05
"""Of a GPU: what an allocator cannot use."""


@dataclass(frozen=True)
class GPU:
    """Dense TFLOP/s of matrix products that add up in fp32, and memory in GiB."""

    bf16: float
    tf32: float
    fp32: float
    memory_gib: float

    def peak_flops(self, precision: Precision) -> float:
        """FLOP/s."""
        return 1e12 * {"bf16": self.bf16, "tf32": self.tf32, "fp32": self.fp32}[precision]


# Keys are what torch.cuda.get_device_name says. Datasheets print rates with sparsity where they
# can: those are halved here. The best known of a family is its first.
GPUS: dict[str, GPU] = {
    "NVIDIA B200": GPU(2250, 1125, 75, 179),
    "NVIDIA H200": GPU(989.4, 494.7, 66.9, 140),
    "NVIDIA H200 NVL": GPU(835.5, 417.5, 60, 140),
    "NVIDIA H100 80GB HBM3": GPU(989.4, 494.7, 66.9, 79.6),
    "NVIDIA H100 NVL": GPU(835.5, 417.5, 60, 93.6),
    "NVIDIA H100 PCIe": GPU(756, 378, 51, 79.6),
    "NVIDIA GH200 480GB": GPU(989.4, 494.7, 66.9, 95),
    "NVIDIA A100-SXM4-80GB": GPU(312, 156, 19.5, 79.2),
    "NVIDIA A100 80GB PCIe": GPU(312, 156, 19.5, 79.2),
    "NVIDIA A100-SXM4-40GB": GPU(312, 156, 19.5, 39.4),
    "NVIDIA A100-PCIE-40GB": GPU(312, 156, 19.5, 39.4),
    "NVIDIA L40S": GPU(362, 183, 91.6, 44.5),
    "NVIDIA L4": GPU(121, 60, 30.3, 22),
    "NVIDIA A10": GPU(125, 62.5, 31.2, 22),
    "NVIDIA RTX 6000 Ada Generation": GPU(364.2, 182.1, 91.1, 47.5),
    "NVIDIA RTX A6000": GPU(154.8, 77.4, 38.7, 47.5),
    "NVIDIA GeForce RTX 5090": GPU(209.5, 104.8, 104.8, 31.3),
    "NVIDIA GeForce RTX 4090": GPU(165.2, 82.6, 82.6, 23.5),
    "NVIDIA GeForce RTX 3090": GPU(71, 35.6, 35.6, 23.5),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs that train together. `mfu` is assumed: no plan can know it."""

    gpu_name: str
    gpu: GPU
    num_gpus: int
    precision: Precision = "tf32"
    strategy: Strategy = "ddp"
    mfu: float = 0.4

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"{self.num_gpus} GPUs: at least 1 is wanted")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"an MFU of {self.mfu} is not in (0, 1]")

    @property
    def flops(self) -> float:
        """FLOP/s that are assumed of all GPUs together."""
        return self.num_gpus * self.mfu * self.gpu.peak_flops(self.precision)

    @property
    def usable_bytes(self) -> int:
        """Of one GPU's memory."""
        return int(self.gpu.memory_gib * 2**30 * (1 - FRAGMENTATION)) - RESERVE_BYTES


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """FLOP/s of a device by torch's name for it; None where it is not known."""
    gpu = GPUS.get(device_name)
    return None if gpu is None else gpu.peak_flops(precision)


def world_peak_flops(world: World, precision: Precision) -> float | None:
    """FLOP/s of all processes' devices, taken to be like this one's; None on a CPU."""
    if world.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device), precision)
    return None if peak is None else world.size * peak


def find_gpu(text: str) -> tuple[str, GPU]:
    """The first whose name has the words of `text`: H200, "A100 40GB", 4090.

    Raises ValueError that lists the names.
    """
    for name, gpu in GPUS.items():
        if set(_words(text)) <= set(_words(name)) and _words(text):
            return name, gpu
    raise ValueError(f"GPU {text!r} is not known; known: {', '.join(GPUS)}")


def _words(name: str) -> list[str]:
    return name.lower().replace("-", " ").split()
