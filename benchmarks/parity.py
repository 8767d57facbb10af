"""Compare this implementation with recorded numbers of the published one.

    python benchmarks/parity.py DIR [--device cuda] [--kernels triton] [--precision bf16]

DIR holds file sets NAME.model.safetensors + NAME.io.safetensors (+ NAME.guide.safetensors), time
grids, training-time quantiles and manifests.json; tests/golden is such a folder. One line per
output; exits 1 when an error is above its bound. The records are in fp32: in tf32 and bf16 what the
models compute may be off by LEAST_BOUND: bf16 was, on a CPU, by a third of it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rae.kernels.dispatch import Kernels, check_kernels
from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.decoder import Decoder
from rae.models.dit_dh import DiTDH
from rae.models.fused import fuse
from rae.models.layers import store_matmul_weights
from rae.models.parity import (
    FORWARD_BOUND,
    Result,
    compare_decoder,
    compare_dit_dh,
    relative_error,
)
from rae.models.rae import RAE
from rae.models.sampling import default_shift, shift_time, timesteps
from rae.models.tensor_files import load_strictly, read_tensors
from rae.server.devices import resolve_precision, set_matmul_precision
from rae.training.stage2.losses import interpolate, logit_normal_quantile, velocity_loss

M = TypeVar("M", bound=nn.Module)

LEAST_BOUND = {"fp32": 0.0, "tf32": 1e-2, "bf16": 4e-2}

# The recorded quantiles are those of a random draw, off the exact ones by 2e-3 themselves; a
# wrong distribution (uniform, or no shift) is off by more than 3e-2.
DRAW_BOUND = 5e-3


class Setup(NamedTuple):
    """Where the models run, and on which kernels; None for the plain layers."""

    device: torch.device = torch.device("cpu")
    kernels: str | None = None
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return resolve_precision(self.precision, self.device)[1]

    def place(self, model: M) -> M:
        model.to(self.device)
        if self.kernels is not None:
            fuse(model, self.dtype, self.kernels, self.kernels)
        else:
            store_matmul_weights(model, self.dtype)
        return model

    def named(self, stem: str, results: Iterator[Result]) -> Iterator[Result]:
        """What the models compute, under the file set's name. Its ValueErrors get the name, too."""
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )
        try:
            with autocast:
                for name, error, bound in results:
                    yield Result(f"{stem} {name}", error, max(bound, LEAST_BOUND[self.precision]))
        except ValueError as error:
            raise ValueError(f"{stem}: {error}") from error

    def read(self, path: Path) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in read_tensors(path).items()}


def check_folder(folder: Path, setup: Setup) -> Iterator[Result]:
    """Every comparison of a folder. Raises ValueError for a file that is not understood."""
    for path in sorted(folder.rglob("*")):
        if path.name == "manifests.json":
            yield from check_manifests(json.loads(path.read_text()))
        elif path.name.endswith((".model.safetensors", ".guide.safetensors")):
            stem = path.name.rsplit(".", 2)[0]
            if not path.with_name(f"{stem}.io.safetensors").exists():
                raise ValueError(f"{path.name} has no {stem}.io.safetensors beside it")
        elif path.suffix == ".safetensors":
            yield from check_file(path, setup)


def check_file(path: Path, setup: Setup) -> Iterator[Result]:
    tensors = setup.read(path)
    stem = path.name.removesuffix(".safetensors").removesuffix(".io")
    if {"x", "t", "y"} <= tensors.keys():
        yield from check_dit_dh(path, stem, tensors, setup)
    elif {"z", "image"} <= tensors.keys():
        yield from check_decoder(path, stem, tensors, setup)
    elif {"q", "t", "t_shifted", "shift"} <= tensors.keys():
        yield from check_training_times(stem, tensors)
    elif {"losses", "noise"} <= tensors.keys():
        return  # steps of training: tests/training/test_stage2_parity.py
    elif all(re.fullmatch(r"\d+_\d+", key) for key in tensors):
        for key, grid in tensors.items():
            pixels, num_steps = map(int, key.split("_"))
            shift = default_shift((768, pixels // 16, pixels // 16))
            error = relative_error(timesteps(num_steps, shift), grid)
            yield Result(f"{stem} {key}", error, FORWARD_BOUND)
    else:
        raise ValueError(f"{path.name}: unknown contents {sorted(tensors)}")


def check_dit_dh(path: Path, stem: str, io: dict[str, Tensor], setup: Setup) -> Iterator[Result]:
    model = load_dit_dh(path.with_name(f"{stem}.model.safetensors"), path, "config")
    guide_path = path.with_name(f"{stem}.guide.safetensors")
    guide = load_dit_dh(guide_path, path, "guide_config") if guide_path.exists() else None
    model, guide = setup.place(model), setup.place(guide) if guide else None
    yield from setup.named(stem, compare_dit_dh(model, guide, io))
    yield from setup.named(stem, compare_training(model, io))


@torch.no_grad()
def compare_training(model: DiTDH, io: dict[str, Tensor]) -> Iterator[Result]:
    x, t, y = io["x"], io["t"], io["y"]
    if "train_xt" in io:
        error = relative_error(interpolate(io["data"], x, t), io["train_xt"])
        yield Result("train_xt", error, FORWARD_BOUND)
    if "train_loss" in io:
        error = relative_error(velocity_loss(model, io["data"], x, t, y), io["train_loss"])
        yield Result("train_loss", error, FORWARD_BOUND)


def load_dit_dh(path: Path, io_path: Path, key: str) -> DiTDH:
    """The configuration is in the weights' own metadata, or under `key` in the io file's."""
    config = metadata(path).get("config") or metadata(io_path)[key]
    with torch.device("meta"):
        model = DiTDH(DiTDHConfig.from_published(json.loads(config)))
    load_strictly(model, read_tensors(path), path)
    return model


def check_decoder(path: Path, stem: str, io: dict[str, Tensor], setup: Setup) -> Iterator[Result]:
    model_path = path.with_name(f"{stem}.model.safetensors")
    config = metadata(model_path).get("config") or metadata(path)["config"]
    config = DecoderConfig.from_published(json.loads(config))
    mean, std = io["encoder_mean"].flatten().tolist(), io["encoder_std"].flatten().tolist()
    rae = RAE(config, image_mean=mean, image_std=std)
    load_strictly(rae.decoder, read_tensors(model_path), model_path)
    rae.latents_mean, rae.latents_var = io.get("latent_mean"), io["latent_var"]
    rae.eps = io.get("eps", rae.eps)
    yield from setup.named(stem, compare_decoder(setup.place(rae), io))


def check_training_times(stem: str, io: dict[str, Tensor]) -> Iterator[Result]:
    shift = float(io["shift"])
    tau = logit_normal_quantile(io["q"])
    middles = (torch.arange(100_000) + 0.5) / 100_000
    mean = shift_time(logit_normal_quantile(middles), shift).mean()
    yield Result(f"{stem} t", relative_error(tau, io["t"]), DRAW_BOUND)
    error = relative_error(shift_time(tau, shift), io["t_shifted"])
    yield Result(f"{stem} t_shifted", error, DRAW_BOUND)
    if "mean_shifted" in io:
        error = relative_error(mean, io["mean_shifted"])
        yield Result(f"{stem} mean_shifted", error, DRAW_BOUND)


def check_manifests(manifests: dict[str, Any]) -> Iterator[Result]:
    """Names and shapes of the real models, on the meta device: no memory."""
    for name, manifest in manifests.items():
        config = manifest["config"]
        with torch.device("meta"):
            if "latent_channels" in config:
                model = Decoder(DecoderConfig(**config))
            else:
                model = DiTDH(DiTDHConfig.from_published(config))
        ours = {key: list(value.shape) for key, value in model.state_dict().items()}
        theirs: dict[str, list[int]] = manifest["tensors"]
        different = sum(ours.get(key) != theirs.get(key) for key in ours.keys() | theirs.keys())
        yield Result(f"manifest {name}", float(different), 0.0)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="a folder of the golden format")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--kernels", choices=get_args(Kernels), help="the plain layers without")
    parser.add_argument("--precision", choices=LEAST_BOUND, default="fp32")
    args = parser.parse_args()
    folder: Path = args.folder
    results: list[Result] = []
    try:
        if args.kernels is not None:
            check_kernels(args.kernels, "auto", args.device)
        resolve_precision(args.precision, args.device)
        set_matmul_precision(args.precision)
        for result in check_folder(folder, Setup(args.device, args.kernels, args.precision)):
            results.append(result)
            verdict = "ok" if result.passed else "FAILED"
            line = f"{result.name:<48} {result.error:9.2e}  bound {result.bound:7.1e}  {verdict}"
            sys.stdout.write(line + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"parity: {error}")
    except KeyError as error:
        sys.exit(f"parity: {folder}: a file set lacks {error}")
    if not results:
        sys.exit(f"parity: {folder} holds no file set")
    failed = sum(not result.passed for result in results)
    sys.stdout.write(f"{len(results)} outputs compared, {failed} above their bound\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
