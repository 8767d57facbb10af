"""Time one forward of a published model: ours as the server runs it, against the authors' code.

    python benchmarks/forward.py --upstream DIR [--model DiTDH-XL-256] [--batch 1] [--json FILE]

DIR is a clone of github bytetriper/RAE; what its `stage2.models.DDT` imports must be installed.
Both get the same random weights, none of them zero. All variants run in turns, so that a busy
machine slows all alike; figures are medians over the turns, and ratios are ratios of medians.

- authors fp32: their default on a CPU; on CUDA their scripts turn TF32 on: authors tf32. authors
  bf16: one autocast context stays open over all turns, as their sampler keeps it open over its
  evaluations, so that weights are cast once; not timed.
- ours fp32, ours bf16: a model that `server/devices.py` has prepared.
- matmuls: every linear of the model that has a row per token, and nothing else, as plain
  `F.linear` in bf16, each with its own weights: caches are as cold as in the model. Their FLOPs
  over their time is the ceiling, which packed weights may pass. `of_the_ceiling` is the rate of
  our bf16 forward, with the FLOPs of all its products, attention's too, over that ceiling;
  `of_the_ceiling_linears` is the same with the FLOPs of those linears alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine_facts import machine
from subjects import draw_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rae.models.config import CONFIGS, DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.server.devices import prepare
from rae.training.precision import Precision, set_matmul_precision

FP32_BOUND = 1e-5
Forward = Callable[[], Tensor]
Shape = tuple[int, int, int]


class LinearShapes(TorchDispatchMode):
    """Collects (M, K, N) of every matrix product that is not batched."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Shape] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            rows, weight = args[-2:]
            self.shapes.append((*rows.shape, weight.shape[1]))
        return func(*args, **(kwargs or {}))


def count(config: DiTDHConfig, batch: int) -> tuple[list[Shape], float]:
    """Shapes of the linears with a row per token, and the GFLOP of a forward, of all of it."""
    with torch.device("meta"):
        model = DiTDH(config).requires_grad_(False)
        inputs = example(config, batch)
    with FlopCounterMode(display=False) as flops, LinearShapes() as linears:
        model(*inputs)
    per_token = [shape for shape in linears.shapes if shape[0] == batch * config.num_tokens]
    return per_token, flops.get_total_flops() / 1e9


def example(config: DiTDHConfig, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(batch, *config.latent_shape)
    return latents, torch.rand(batch), torch.randint(config.num_classes, (batch,))


def authors_model(upstream: Path, config: DiTDHConfig, weights: dict[str, Tensor]) -> nn.Module:
    """Their model in eval mode on given weights, not copied. These get requires_grad, as in their
    sampler: autocast remembers only casts of such weights. Raises ImportError."""
    sys.path.insert(0, str(upstream / "src"))
    from stage2.models.DDT import DiTwDDTHead  # type: ignore[import-not-found]

    with torch.device("meta"):
        model = DiTwDDTHead(**config.to_published())
    model.load_state_dict(weights, assign=True)
    return model.eval()


def our_model(
    config: DiTDHConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> DiTDH:
    """A model on the same weights, not copied, prepared as the server prepares it."""
    with torch.device("meta"):
        model = DiTDH(config)
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    prepare(model, device, dtype)
    return model


def matmuls(
    shapes: list[Shape], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Forward:
    """All linears of `shapes`, one after another, on distinct weights."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    inputs = {shape: draw(*shape[:2]) for shape in shapes}
    calls = [(inputs[shape], draw(shape[2], shape[1]), draw(shape[2])) for shape in shapes]

    def run() -> Tensor:
        output = torch.empty(0)
        with torch.inference_mode():
            for x, weight, bias in calls:
                output = F.linear(x, weight, bias)
        return output

    return run


def variants(
    upstream: Path, config: DiTDHConfig, batch: int, device: torch.device
) -> dict[str, Forward]:
    torch.manual_seed(0)
    with device:
        model = DiTDH(config)
    draw_weights(model)
    weights = model.state_dict()
    theirs = authors_model(upstream, config, weights)
    inputs = tuple(x.to(device) for x in example(config, batch))

    def autocast(enabled: bool) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def authors(precision: Precision) -> Forward:
        def run() -> Tensor:
            set_matmul_precision(precision)
            with torch.no_grad(), autocast(precision == "bf16"):
                return theirs(*inputs).float()

        return run

    def ours(dtype: torch.dtype) -> Forward:
        model = our_model(config, weights, device, dtype)

        def run() -> Tensor:
            set_matmul_precision("fp32")
            with torch.inference_mode(), autocast(dtype != torch.float32):
                return model(*inputs).float()

        return run

    return {
        "authors fp32": authors("fp32"),
        **({"authors tf32": authors("tf32")} if device.type == "cuda" else {}),
        "authors bf16": authors("bf16"),
        "ours fp32": ours(torch.float32),
        "ours bf16": ours(torch.bfloat16),
        "matmuls": matmuls(count(config, batch)[0], device),
    }


def time_in_turns(
    runs: dict[str, Forward], turns: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Milliseconds of every turn of every variant after two that are not counted, and outputs."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    outputs: dict[str, Tensor] = {}
    with torch.autocast(device.type, torch.bfloat16):  # the context that stays open
        for _ in range(turns + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                outputs[name] = run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[2:] for name, values in times.items()}, outputs


def report(
    times: dict[str, list[float]], outputs: dict[str, Tensor], config: DiTDHConfig, batch: int
) -> dict[str, Any]:
    ms = {name: statistics.median(values) for name, values in times.items()}
    reference = outputs["authors fp32"].double()
    shapes, gflop = count(config, batch)
    matmul_gflop = sum(2 * rows * inner * columns for rows, inner, columns in shapes) / 1e9
    return {
        "ms": {name: round(value, 2) for name, value in ms.items()},
        "ms_fastest": {name: round(min(values), 2) for name, values in times.items()},
        **{
            f"faster_than_{name.replace(' ', '_')}": value / ms["ours bf16"]
            for name, value in ms.items()
            if name.startswith("authors")
        },
        "fp32_faster_than_authors_fp32": ms["authors fp32"] / ms["ours fp32"],
        "error": {
            name: ((outputs[name] - reference).norm() / reference.norm()).item()
            for name in ("authors bf16", "ours fp32", "ours bf16")
        },
        "gflop": gflop,
        "matmul_gflop": matmul_gflop,
        "ceiling_gflop_per_s": 1000 * matmul_gflop / ms["matmuls"],
        "forward_gflop_per_s": 1000 * gflop / ms["ours bf16"],
        "of_the_ceiling": gflop / matmul_gflop * ms["matmuls"] / ms["ours bf16"],
        "of_the_ceiling_linears": ms["matmuls"] / ms["ours bf16"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", type=Path, required=True, help="a clone of bytetriper/RAE")
    parser.add_argument("--model", default="DiTDH-XL-256", choices=CONFIGS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    config = CONFIGS[args.model]
    try:
        runs = variants(args.upstream, config, args.batch, args.device)
    except ImportError as error:
        sys.exit(f"forward: {args.upstream} is no clone of bytetriper/RAE that can run: {error}")
    figures: dict[str, Any] = {"model": args.model, "batch": args.batch, "turns": args.turns}
    figures |= machine(args.device)
    figures |= report(*time_in_turns(runs, args.turns, args.device), config, args.batch)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    figures["peak_rss_gib_of_all"] = rss / 2**20
    text = json.dumps(figures, indent=1) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.write_text(text)
    errors = figures["error"]
    exact = errors["ours fp32"] <= FP32_BOUND and errors["ours bf16"] <= errors["authors bf16"]
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
