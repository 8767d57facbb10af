"""Whether every kernel that a forward of a published model launches compiles, without a GPU.

    python benchmarks/compile_models.py [--model DiTDH-XL-256] [--batch 1 --batch 2]

The fused model runs on the meta device, as the server would launch it, each kernel by the tuning
table of sm_90, compiled and not run. compile_kernels.py checks the tables' entries one by one; this
finds a variant that a model launches and nobody listed. A line per model and dtype, with its
kernels; an error of the compiler ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from compile_kernels import compiling
from torch import Tensor, nn

from rae.kernels import adaln, attention, swiglu
from rae.kernels.dispatch import TABLES, Selection, Table
from rae.models.config import CONFIGS, DECODER_CONFIGS
from rae.models.decoder import Decoder
from rae.models.dit_dh import DiTDH
from rae.models.fused import fuse

ARCHITECTURE = 90
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = ("DiTDH-XL-256", "DiTDH-S-256", "DiTDH-XL-512", "decoder-ViT-XL-256")
KERNELS = {adaln: "_adaln", attention: "_attention", swiglu: "_swiglu"}


@contextmanager
def launching() -> Iterator[None]:
    """The ops launch on the meta device, where they would give a fake result, and take Triton."""
    table = Table.read(TABLES / f"sm_{ARCHITECTURE}.json")

    def select(op: str, x: Tensor, kernels: str, **dims: int) -> Selection:
        entry = table.find(op, str(x.dtype).removeprefix("torch."), dims)
        return Selection("triton", entry.config)

    replaced = {(module, name): getattr(module, name) for module, name in KERNELS.items()}
    replaced |= {(module, "select"): module.select for module in KERNELS}
    replaced |= {(swiglu, "can_launch"): swiglu.can_launch, (F, "linear"): F.linear}
    linear = F.linear
    for module, name in KERNELS.items():
        setattr(module, name, getattr(module, name)._init_fn)
        module.select = select  # type: ignore[attr-defined]
    swiglu.can_launch = lambda device_type: True
    # Autocast knows no meta device.
    F.linear = lambda x, weight, bias=None: linear(x.to(weight.dtype), weight, bias)
    try:
        yield
    finally:
        for (module, name), value in replaced.items():
            setattr(module, name, value)


def example(name: str, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model on the meta device, and inputs of its forward."""
    with torch.device("meta"):
        if name in DECODER_CONFIGS:
            config = DECODER_CONFIGS[name]
            tokens = torch.randn(batch, config.grid**2, config.latent_channels)
            return Decoder(config), (tokens,)
        model = DiTDH(CONFIGS[name])
        labels = torch.zeros(batch, dtype=torch.int64)
        return model, (torch.randn(batch, *model.config.latent_shape), torch.rand(batch), labels)


def kernels_of(name: str, batch: int, dtype: torch.dtype) -> Counter[str]:
    """How often a forward launches each kernel. Raises the compiler's errors."""
    model, inputs = example(name, batch)
    model.eval().requires_grad_(False)
    fuse(model, dtype, "triton", "triton")
    with torch.inference_mode(), launching(), compiling(ARCHITECTURE, name_of) as compiled:
        model(*inputs)
    return Counter(compiled)


def name_of(kernel: Any) -> str:  # noqa: ANN401 - Triton's CompiledKernel has no types
    return kernel.metadata.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = (*CONFIGS, *DECODER_CONFIGS)
    parser.add_argument("--model", action="append", choices=known)
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    args = parser.parse_args()
    for name in args.model or MODELS:
        for dtype, batch in product(args.dtype or DTYPES, args.batch or (1, 2)):
            found = kernels_of(name, batch, DTYPES[dtype])
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in found.items())
            sys.stdout.write(f"{name}, {dtype}, {batch}: {kernels}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
