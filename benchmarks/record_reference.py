"""Run the authors' code on a checkpoint's weights and record its numbers, in fp32 on the CPU.

    python benchmarks/record_reference.py --upstream DIR --checkpoint FOLDER --out DIR

DIR of --upstream is a clone of github bytetriper/RAE; its code needs timm, einops, torchdiffeq,
regex and tqdm beside transformers. `rae verify FOLDER --reference DIR` compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rae.models.checkpoint import DECODER_FILE, DIT_DH_FILE, GUIDE_FILE, STATISTICS
from rae.models.checkpoint_config import (
    AutoencoderConfig,
    CheckpointConfig,
    CheckpointError,
    read_any_config,
)
from rae.models.config import DiTDHConfig
from rae.models.sampling import draw_noise
from rae.models.tensor_files import read_fp32

SEEDS = (0, 1)
TIMES = (0.35, 0.9)
SCALE = 1.5
NUM_STEPS = 6


def published_dit_dh(config: DiTDHConfig, path: Path) -> Any:  # noqa: ANN401
    model = import_module("stage2.models.DDT").DiTwDDTHead(**config.to_published())
    model.load_state_dict(read_fp32(path), assign=True)
    return model.eval()


def record_dit_dh(folder: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    """Inputs, velocities and Euler trajectories, named as in rae.models.parity."""
    transport = import_module("stage2.transport")
    sampler = transport.Sampler(transport.create_transport(time_dist_shift=config.shift))
    ode = sampler.sample_ode(sampling_method="euler", num_steps=NUM_STEPS)
    model = published_dit_dh(config.dit_dh, folder / DIT_DH_FILE)
    x, t = draw_noise(config.dit_dh.latent_shape, SEEDS), torch.tensor(TIMES)
    y = torch.tensor([0, config.dit_dh.num_classes - 1])
    null = torch.full_like(y, config.dit_dh.null_label)
    twice = {"x": torch.cat([x, x]), "t": torch.cat([t, t]), "y": torch.cat([y, null])}
    io = {
        "x": x,
        "t": t,
        "y": y,
        "shift": torch.tensor(config.shift),
        "num_steps": torch.tensor(NUM_STEPS),
        "grid": ode.__self__.t,
        "v": model(x, t, y),
        "euler_final": ode(x, model.forward, y=y)[-1],
    }
    if config.dit_dh.has_null_label:
        io["v_null"] = model(x, t, null)
        io[f"v_cfg_{SCALE}"] = model.forward_with_cfg(**twice, cfg_scale=SCALE)[: len(x)]
        guided: Callable[..., Tensor] = model.forward_with_cfg
        final = ode(twice["x"], guided, y=twice["y"], cfg_scale=SCALE)[-1]
        io[f"euler_cfg_{SCALE}"] = final[: len(x)]
    if config.guide is not None:
        guide = published_dit_dh(config.guide, folder / GUIDE_FILE)
        options = {"cfg_scale": SCALE, "additional_model_forward": guide.forward}
        guided = model.forward_with_autoguidance
        io[f"v_autoguidance_{SCALE}"] = guided(x, t, y, **options)
        io[f"euler_autoguidance_{SCALE}"] = ode(x, guided, y=y, **options)[-1]
    return io


def record_decoder(folder: Path, config: AutoencoderConfig) -> dict[str, Tensor]:
    """Latents and the image that the authors' RAE decodes them to."""
    decoders = import_module("stage1.decoders.decoder")
    size = config.decoder
    tensors = read_fp32(folder / DECODER_FILE)
    statistics = {key: tensors.pop(key) for key in STATISTICS if key in tensors}
    vit = decoders.ViTMAEConfig(
        hidden_size=size.latent_channels,
        decoder_hidden_size=size.hidden_size,
        decoder_num_hidden_layers=size.depth,
        decoder_num_attention_heads=size.num_heads,
        decoder_intermediate_size=size.intermediate_size,
        patch_size=size.patch_size,
        image_size=size.image_size,
        layer_norm_eps=size.layer_norm_eps,
    )
    decoder = decoders.GeneralDecoder(vit, num_patches=size.grid**2)
    decoder.load_state_dict(tensors, assign=True)
    # The authors' RAE would load an encoder first, which decoding has no use for.
    rae = SimpleNamespace(
        decoder=decoder.eval(),
        do_normalization=True,
        reshape_to_2d=True,
        latent_mean=statistics.get("latents_mean"),
        latent_var=statistics["latents_var"],
        eps=float(statistics["eps"]),
        encoder_mean=torch.tensor(config.image_mean).view(1, 3, 1, 1),
        encoder_std=torch.tensor(config.image_std).view(1, 3, 1, 1),
    )
    z = draw_noise((size.latent_channels, size.grid, size.grid), SEEDS)
    return {"z": z, "image": import_module("stage1.rae").RAE.decode(rae, z)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", type=Path, required=True, help="clone of bytetriper/RAE")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.upstream / "src"))
    try:
        config, sha256 = read_any_config(arguments.checkpoint)
        recorded = {"decoder": record_decoder(arguments.checkpoint, config)}
        if isinstance(config, CheckpointConfig):
            recorded["dit_dh"] = record_dit_dh(arguments.checkpoint, config)
    except (CheckpointError, ModuleNotFoundError) as error:
        sys.exit(f"record_reference: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, io in recorded.items():
        path = arguments.out / f"{name}.io.safetensors"
        tensors = {key: value.contiguous().clone() for key, value in io.items()}
        save_file(tensors, path, {"checkpoint": json.dumps([config.name, sha256])})
        sys.stdout.write(f"{path}: {', '.join(io)}\n")


if __name__ == "__main__":
    main()
