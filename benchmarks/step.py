"""One forward of a DiT^DH with the kernels and without, in bf16, on random weights.

    python benchmarks/step.py [--model DiTDH-XL-256] [--batch 1 --batch 32] [--device cuda]

Medians in milliseconds by batch and choice of kernels, taken in turns; JSON on stdout. They are
calls without graphs: of small batches they time the host, which the server's graphs spare.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from machine_facts import machine
from torch import Tensor

from rae.models.config import CONFIGS, DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.server.devices import prepare

CHOICES = ("auto", "triton", "library", "reference")


def forward(
    config: DiTDHConfig, batch: int, device: torch.device, kernels: str
) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    with device:
        model = DiTDH(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
        latents, t = torch.randn(batch, *config.latent_shape), torch.rand(batch)
        labels = torch.randint(config.num_classes, (batch,))
    prepare(model, device, torch.bfloat16, kernels)

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            return model(latents, t, labels)

    return run


def milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="DiTDH-XL-256", choices=CONFIGS)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--kernels", choices=CHOICES, action="append")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    args = parser.parse_args()
    figures: dict[str, object] = {"model": args.model, **machine(args.device)}
    for batch in args.batch or (1, 8, 32):
        runs = {
            kernels: forward(CONFIGS[args.model], batch, args.device, kernels)
            for kernels in args.kernels or CHOICES
        }
        times: dict[str, list[float]] = {kernels: [] for kernels in runs}
        for turn in range(args.turns + 2):
            for kernels, run in runs.items():
                elapsed = milliseconds(run, args.device)
                if turn >= 2:
                    times[kernels].append(elapsed)
        figures[f"batch {batch}"] = {kernels: median(each) for kernels, each in times.items()}
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
