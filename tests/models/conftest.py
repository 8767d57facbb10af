"""A published model in the authors' layout: small, with recorded weights and outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from authors_folder import AuthorsFolder
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "golden"


def metadata(name: str) -> dict[str, Any]:
    with safe_open(GOLDEN / name, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


@pytest.fixture
def authors_folder(tmp_path: Path) -> AuthorsFolder:
    """Guided DiT^DH and decoder of tests/golden, saved as the authors save."""
    root = tmp_path / "authors"
    for name, file in {
        "ditdh_a.model": "DiTs/stage2_model.pt",
        "ditdh_a.guide": "DiTs/guide.pt",
        "decoder_a.model": "decoder/model.pt",
    }.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        torch.save(load_file(GOLDEN / f"{name}.safetensors"), root / file)
    io = load_file(GOLDEN / "decoder_a.io.safetensors")
    torch.save({"mean": io["latent_mean"], "var": io["latent_var"]}, root / "stat.pt")
    decoder = metadata("decoder_a.io.safetensors")["config"]
    decoder |= {"hidden_act": "gelu", "qkv_bias": True, "model_type": "vit_mae", "patch_size": "?"}
    (root / "decoder" / "config.json").write_text(json.dumps(decoder))
    networks = metadata("ditdh_a.io.safetensors")
    shift = float(load_file(GOLDEN / "ditdh_a.io.safetensors")["shift"])
    return AuthorsFolder(root, authors_config(networks, shift))


def authors_config(networks: dict[str, Any], shift: float) -> dict[str, Any]:
    target = "stage2.models.DDT.DiTwDDTHead"
    return {
        "stage_1": {
            "target": "stage1.RAE",
            "params": {
                "encoder_cls": "MAEwNorm",
                "encoder_config_path": "facebook/vit-mae-base",
                "encoder_input_size": 16,
                "encoder_params": {"model_name": "facebook/vit-mae-base"},
                "decoder_config_path": "decoder",
                "decoder_patch_size": 4,
                "pretrained_decoder_path": "decoder/model.pt",
                "noise_tau": 0.0,
                "reshape_to_2d": True,
                "normalization_stat_path": "stat.pt",
            },
        },
        "stage_2": {
            "target": target,
            "params": networks["config"],
            "ckpt": "DiTs/stage2_model.pt",
        },
        "transport": {
            "params": {
                "path_type": "Linear",
                "prediction": "velocity",
                "time_dist_type": "uniform",
            }
        },
        "sampler": {
            "mode": "ODE",
            "params": {
                "sampling_method": "euler",
                "num_steps": 10,
                "atol": 1e-6,
                "rtol": 1e-3,
                "reverse": False,
            },
        },
        "guidance": {
            "method": "autoguidance",
            "scale": 1.42,
            "t-min": 0.0,
            "t-max": 1.0,
            "guidance_model": {
                "target": target,
                "params": networks["guide_config"],
                "ckpt": "DiTs/guide.pt",
            },
        },
        "misc": {
            "latent_size": [24, 4, 4],
            "num_classes": 10,
            "time_dist_shift_dim": shift**2 * 4096,
            "time_dist_shift_base": 4096,
        },
        "training": {"epochs": 1400},
    }
