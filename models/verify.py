"""Is a checkpoint folder what it was when it was made, and does it compute what it did?

`fingerprints` are outputs for fixed inputs, written into config.json when a folder is made;
`verify` recomputes them beside everything else that can be checked without the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rae.models.checkpoint import (
    DECODER_FILE,
    attach_encoder,
    load_dit_dh,
    load_rae,
    networks,
    write_config,
)
from rae.models.checkpoint_config import (
    AutoencoderConfig,
    CheckpointConfig,
    CheckpointError,
    read_any_config,
)
from rae.models.config import is_number
from rae.models.dit_dh import DiTDH
from rae.models.parity import FORWARD_BOUND, Result, compare_decoder, compare_dit_dh, relative_error
from rae.models.rae import RAE
from rae.models.reconstruct import as_images, drawn_picture, psnr_db, read_picture, reconstruct
from rae.models.sampling import draw_noise
from rae.models.tensor_files import SAFETENSORS_NAMES, file_problem, read_tensors

SEED = 0
TIME = 0.5
NUM_VALUES = 16
# The same weights differ by up to 9e-7 in fp32 and 5e-3 in bf16 between avx512, avx2 and sse4
# kernels (the digits; random S and XL). What was tried on the digits' three networks, and the least
# error in either precision: a block zeroed 7e-2; a rope table's halves or pairs exchanged 4e-2; a
# position table's halves 6e-2. Of 1,263 swaps of two tensors of one shape fp32 sees 1,257 (the
# others are biases of attention keys, which softmax cancels) and bf16 743; of 91 tensors made 1 %
# larger fp32 sees 89 and bf16 none. Neither sees the rows of other labels; the sha256 sees all.
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2}
# A uniform grey picture is at most half a range off: it has 6.02 dB or more against any other.
MIN_PSNR_DB = 5.0


class Check(NamedTuple):
    """`passed` is None for what could not be checked and is no fault."""

    name: str
    passed: bool | None
    detail: str


def load_network(
    folder: Path, config: AutoencoderConfig, name: str, *, keep_bf16: bool
) -> DiTDH | RAE:
    """One of `networks`, or "encoder": the RAE with it, in fp32. Raises CheckpointError."""
    if name == "encoder":
        rae = load_rae(config, folder / DECODER_FILE)
        attach_encoder(rae, config, folder)
        return rae
    path = folder / networks(config)[name]
    if name == "decoder":
        return load_rae(config, path, keep_bf16=keep_bf16)
    return load_dit_dh(getattr(config, name), path, keep_bf16=keep_bf16)


def record_fingerprints(folder: Path) -> AutoencoderConfig:
    """Compute the fingerprints of a folder's networks and write them into its config.json.

    Raises CheckpointError, and leaves config.json as it is, where an output is not finite.
    """
    config, _ = read_any_config(folder)
    return write_config(folder, replace(config, fingerprints=fingerprints(folder, config)))


def fingerprints(folder: Path, config: AutoencoderConfig) -> dict[str, dict[str, Any]]:
    """A record of each network, one loaded at a time. Raises CheckpointError."""
    found = {}
    for name in (*networks(config), *["encoder"] * config.has_encoder):
        found[name] = fingerprint(load_network(folder, config, name, keep_bf16=True))
        if not math.isfinite(found[name]["norm"]):
            raise CheckpointError(f"{folder}: the output of {name} is not finite")
    return found


@torch.inference_mode()
def fingerprint(network: DiTDH | RAE) -> dict[str, Any]:
    """The norm of the outputs for fixed inputs, and 16 of their values, evenly spaced.

    Matmuls run in bf16 where their weights are stored so, as the server runs them.
    """
    is_bf16 = any(weight.dtype == torch.bfloat16 for weight in network.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        outputs = torch.cat([output.float().flatten() for output in _fixed_outputs(network)])
    places = torch.linspace(0, len(outputs) - 1, NUM_VALUES).long()
    return {
        "precision": "bf16" if is_bf16 else "fp32",
        "norm": _rounded(outputs.double().norm()),
        "values": [_rounded(value) for value in outputs[places]],
    }


def _fixed_outputs(network: DiTDH | RAE) -> Iterator[Tensor]:
    """One image at a time: a step of the published XL model in memory with its 3.4 GB mapped."""
    if isinstance(network, RAE):
        if network.encoder is not None:
            yield network.encode_raw(as_images(drawn_picture(network.decoder.config.image_size)))
        else:
            yield network.decode(draw_noise(network.latents_var.shape, [SEED]))
        return
    config = network.config
    latents, t = draw_noise(config.latent_shape, [SEED]), torch.tensor([TIME])
    for label in (config.num_classes // 2, *[config.null_label] * config.has_null_label):
        yield network(latents, t, torch.tensor([label]))


def _rounded(value: Tensor) -> float:
    return float(f"{float(value):.8g}")


def fingerprint_error(found: Mapping[str, Any], recorded: Mapping[str, Any]) -> float:
    """The larger of the norm's and the values' relative errors; infinite for another kind."""
    values = recorded.get("values")
    if not (
        is_number(recorded.get("norm"))
        and isinstance(values, list)
        and len(values) == NUM_VALUES
        and all(map(is_number, values))
    ):
        return math.inf
    errors = [
        relative_error(torch.tensor(found[key]), torch.tensor(recorded[key]))
        for key in ("norm", "values")
    ]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def verify(
    folder: Path, *, reference: Path | None = None, image: Path | None = None
) -> Iterator[Check]:
    """Every check of a checkpoint folder, one after another, whatever the earlier ones found.

    `reference` holds the published implementation's numbers for this checkpoint (see parity.py),
    `image` is what the RAE is asked to reconstruct instead of a drawn picture.
    """
    try:
        config, sha256 = read_any_config(folder)
    except CheckpointError as error:
        yield Check("config.json", False, str(error))
        return
    yield Check("config.json", True, f"{config.name}, sha256 {sha256}")
    yield from check_files(folder, config)
    for name in networks(config):
        yield from check_network(folder, config, name)
    yield from check_encoder(folder, config, image)
    if reference is not None:
        yield from check_reference(folder, config, reference)


def check_files(folder: Path, config: AutoencoderConfig) -> Iterator[Check]:
    """Every weights file's sha256, and files of which none is recorded."""
    there = {path.name for path in folder.glob("*.safetensors")}
    there |= {f"encoder/{path.name}" for path in folder.glob("encoder/*")}
    for name in sorted(there | config.sha256.keys() | set(networks(config).values())):
        recorded = config.sha256.get(name)
        if recorded is None:
            detail = "not recorded in config.json" if name in there else "missing"
            yield Check(f"{name} sha256", False, detail)
            continue
        try:
            problem = file_problem(folder / name, recorded)
        except OSError as error:
            problem = str(error)
        yield Check(f"{name} sha256", problem is None, problem or "as recorded")


def check_network(folder: Path, config: AutoencoderConfig, name: str) -> Iterator[Check]:
    """Names and shapes, finite values, and the fingerprint where one is recorded."""
    file = networks(config)[name]
    try:
        yield check_finite(file, read_tensors(folder / file))
        network = load_network(folder, config, name, keep_bf16=True)
    except CheckpointError as error:
        yield Check(f"{file} tensors", False, str(error))
        yield Check(f"{name} fingerprint", None, "not computed")
        return
    count = sum(weight.numel() for weight in network.parameters())
    yield Check(f"{file} tensors", True, f"named and shaped as in config.json, {count:,} weights")
    yield check_fingerprint(name, network, config.fingerprints.get(name))


def check_fingerprint(name: str, network: DiTDH | RAE, recorded: object) -> Check:
    if recorded is None:
        return Check(f"{name} fingerprint", None, "none is recorded")
    if not isinstance(recorded, dict):
        return Check(f"{name} fingerprint", False, "what is recorded is none")
    found = fingerprint(network)
    precision = found["precision"]
    if precision != recorded.get("precision"):
        detail = f"recorded in {recorded.get('precision')!r}, the weights are {precision}"
        return Check(f"{name} fingerprint", False, detail)
    error, bound = fingerprint_error(found, recorded), BOUNDS[precision]
    detail = f"relative error {error:.1e}, bound {bound:.0e} in {precision}"
    return Check(f"{name} fingerprint", error <= bound, detail)


def check_finite(file: str, tensors: Mapping[str, Tensor]) -> Check:
    """Whether every value of a file is finite, tensor by tensor."""
    bad = []
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_NAMES:
            continue  # refused as such; not every type has an isfinite
        count = int((~tensor.isfinite()).sum())
        if count:
            bad.append(f"{name}: {count} of {tensor.numel()} are not finite")
    return Check(f"{file} values", not bad, "; ".join(bad) or "finite")


def check_encoder(folder: Path, config: AutoencoderConfig, image: Path | None) -> Iterator[Check]:
    """The encoder's values, and a picture's way through it and the decoder."""
    if config.encoder is None or not (folder / "encoder").is_dir():
        wanted = config.encoder and (config.encoder.name or config.encoder.kind)
        detail = f"{wanted} is not in this folder" if wanted else "config.json names none"
        yield Check("reconstruction", None, detail)
        return
    for path in sorted((folder / "encoder").glob("*.safetensors")):
        try:
            yield check_finite(f"encoder/{path.name}", read_tensors(path))
        except CheckpointError as error:
            yield Check(f"encoder/{path.name} values", False, str(error))
    size = config.decoder.image_size
    try:
        picture = read_picture(image, size) if image else drawn_picture(size)
        rae = load_rae(config, folder / DECODER_FILE)
        attach_encoder(rae, config, folder)
        yield check_fingerprint("encoder", rae, config.fingerprints.get("encoder"))
        psnr = psnr_db(reconstruct(rae, picture), picture)
    except ImportError as error:
        yield Check("reconstruction", None, str(error))
    except ValueError as error:
        yield Check("reconstruction", False, str(error))
    else:
        of = image.name if image else "a drawn picture, perhaps unlike what it was trained on"
        detail = f"PSNR {psnr:.1f} dB of {of}; at least {MIN_PSNR_DB} dB"
        yield Check("reconstruction", psnr >= MIN_PSNR_DB, detail)


def check_reference(folder: Path, config: AutoencoderConfig, reference: Path) -> Iterator[Check]:
    """Recorded outputs of the published implementation against ours, in fp32."""
    compared = {name: reference / f"{name}.io.safetensors" for name in ("dit_dh", "decoder")}
    compared = {name: path for name, path in compared.items() if path.is_file()}
    if not compared:
        detail = f"{reference} holds neither dit_dh.io.safetensors nor decoder.io.safetensors"
        yield Check("reference", False, detail)
    for name, path in compared.items():
        if name not in networks(config):
            yield Check(f"reference {name}", False, f"{folder} holds no DiT^DH")
            continue
        try:
            for result in _compare(folder, config, name, read_tensors(path)):
                detail = f"relative error {result.error:.1e}, bound {result.bound:.0e}"
                yield Check(f"reference {name} {result.name}", result.passed, detail)
        except (ValueError, RuntimeError) as error:  # of a file that may hold anything
            yield Check(f"reference {name}", False, f"{path.name}: {error}")


def _compare(
    folder: Path, config: AutoencoderConfig, name: str, io: Mapping[str, Tensor]
) -> Iterator[Result]:
    if "shift" in io and isinstance(config, CheckpointConfig):
        error = relative_error(torch.tensor(config.shift), io["shift"])
        yield Result("shift", error, FORWARD_BOUND)
    load = partial(load_network, folder, config, keep_bf16=False)
    network = load(name)
    if isinstance(network, RAE):
        yield from compare_decoder(network, io)
        return
    guide = load("guide") if "guide" in networks(config) else None
    assert not isinstance(guide, RAE)
    yield from compare_dit_dh(network, guide, io)
