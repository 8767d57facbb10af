"""`rae export`: a checkpoint folder as the authors' files, for their code and for `rae convert`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rae.models.checkpoint import DECODER_FILE, STATISTICS, checked, networks
from rae.models.checkpoint_config import (
    AutoencoderConfig,
    CheckpointConfig,
    CheckpointError,
    read_any_config,
)
from rae.models.config import DiTDHConfig
from rae.models.published import NORMALISATION
from rae.models.published_yaml import ENCODER_CLASSES
from rae.models.sampling import SHIFT_BASE
from rae.models.staging import staging
from rae.models.tensor_files import read_fp32

WEIGHTS = {"dit_dh": "dit_dh/stage2_model.pt", "guide": "guide/stage2_model.pt"}
DECODER, STATS, YAML = "decoder/model.pt", "stat.pt", "config.yaml"
CLASSES = "classes.txt"


def export(folder: Path, out: Path, notify: Callable[[str], None] = lambda _: None) -> list[str]:
    """Write the authors' layout into the new folder `out`; returns the names of the files.

    Flat fp32 state dicts, `stat.pt`, the decoder's config.json, and config.yaml with paths
    relative to `out`, where the authors' format can say what the checkpoint is; classes.txt is
    for `rae convert --classes`. Raises CheckpointError.
    """
    config, _ = read_any_config(folder)
    reason = inexpressible(config)
    if reason:
        notify(f"No {YAML} is written: {reason}")
    with staging(out) as staged, checked(config, folder, with_encoder=False):
        for name, file in networks(config).items():
            if name in WEIGHTS:
                _save(read_fp32(folder / file), staged / WEIGHTS[name])
        tensors = read_fp32(folder / DECODER_FILE)
        statistics = {key: tensors.pop(key) for key in STATISTICS if key in tensors}
        _save(tensors, staged / DECODER)
        mean, var = statistics.get("latents_mean"), statistics["latents_var"]
        _save({"mean": mean, "var": var}, staged / STATS)
        decoder = json.dumps(_decoder_json(config), indent=1) + "\n"
        (staged / "decoder" / "config.json").write_text(decoder)
        eps = float(str(statistics["eps"].numpy()))  # 1e-5, not its fp32's 9.999999747e-06
        if not reason:
            (staged / YAML).write_text(_yaml(config, eps))
        if isinstance(config, CheckpointConfig):
            (staged / CLASSES).write_text("".join(f"{name}\n" for name in config.classes))
        return sorted(str(p.relative_to(staged)) for p in staged.rglob("*") if p.is_file())


def inexpressible(config: AutoencoderConfig) -> str | None:
    """Why the authors' YAML cannot say what a checkpoint is, or None."""
    encoder = config.encoder
    if encoder is None or not encoder.name:
        return "it names the encoder's weights, config.json does not"
    if (config.image_mean, config.image_std) != NORMALISATION[encoder.kind]:
        return f"its pixels are normalised as {encoder.kind} wants them, these are not"
    if isinstance(config, CheckpointConfig) and config.shift < 1:
        return f"its shift is 1 or more, this one is {config.shift}"
    return None


def _save(values: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    torch.save(values, path)


def _decoder_json(config: AutoencoderConfig) -> dict[str, Any]:
    """As the authors' decoder configurations, which transformers' ViTMAEConfig reads."""
    decoder = config.decoder
    return {
        "model_type": "vit_mae",
        "hidden_size": decoder.latent_channels,
        "decoder_hidden_size": decoder.hidden_size,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": decoder.intermediate_size,
        "layer_norm_eps": decoder.layer_norm_eps,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "num_channels": 3,
    }


def _yaml(config: AutoencoderConfig, eps: float) -> str:
    try:
        import yaml
    except ImportError as error:
        raise CheckpointError(
            "YAML files need pyyaml: pip install 'rae-server[convert]'"
        ) from error
    values: dict[str, Any] = {"stage_1": _stage_1(config, eps)}
    if isinstance(config, CheckpointConfig):
        values |= _stage_2(config)
    return yaml.safe_dump(values, sort_keys=False)


def _stage_1(config: AutoencoderConfig, eps: float) -> dict[str, Any]:
    encoder = config.encoder
    assert encoder is not None
    cls = next(name for name, kind in ENCODER_CLASSES.items() if kind == encoder.kind)
    path = "dinov2_path" if encoder.kind == "dinov2" else "model_name"
    return {
        "target": "stage1.RAE",
        "params": {
            "encoder_cls": cls,
            "encoder_config_path": encoder.name,
            "encoder_input_size": encoder.image_size,
            "encoder_params": {path: encoder.name},
            "decoder_config_path": "decoder",
            "decoder_patch_size": config.decoder.patch_size,
            "pretrained_decoder_path": DECODER,
            "noise_tau": 0.0,
            "reshape_to_2d": True,
            "normalization_stat_path": STATS,
            "eps": eps,
        },
    }


def _stage_2(config: CheckpointConfig) -> dict[str, Any]:
    defaults = config.defaults
    low, high = defaults.guidance_interval
    guidance: dict[str, Any] = {
        "method": defaults.guidance_method,
        "scale": defaults.cfg,
        "t_min": low,
        "t_max": high,
    }
    if config.guide is not None:
        guidance["guidance_model"] = _network(config.guide, WEIGHTS["guide"])
    shape = config.dit_dh.latent_shape
    dim = config.shift**2 * SHIFT_BASE
    if math.sqrt(round(dim) / SHIFT_BASE) == config.shift:
        dim = round(dim)  # 196608, as published
    return {
        "stage_2": _network(config.dit_dh, WEIGHTS["dit_dh"]),
        "transport": {"params": {"path_type": "Linear", "prediction": "velocity"}},
        "sampler": {
            "mode": "ODE",
            "params": {"sampling_method": "euler", "num_steps": defaults.steps},
        },
        "guidance": guidance,
        "misc": {
            "latent_size": list(shape),
            "num_classes": config.dit_dh.num_classes,
            "time_dist_shift_dim": dim,
            "time_dist_shift_base": SHIFT_BASE,
        },
    }


def _network(config: DiTDHConfig, file: str) -> dict[str, Any]:
    return {
        "target": "stage2.models.DDT.DiTwDDTHead",
        "params": config.to_published(),
        "ckpt": file,
    }
