"""Published constructor arguments: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rae.models.config import CONFIGS, DECODER_CONFIGS, DecoderConfig, DiTDHConfig

GOLDEN = Path(__file__).parents[1] / "golden"
XL: dict[str, Any] = {
    "input_size": 16,
    "patch_size": 1,
    "in_channels": 768,
    "hidden_size": [1152, 2048],
    "depth": [28, 2],
    "num_heads": [16, 16],
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "use_qknorm": False,
    "use_swiglu": True,
    "use_rope": True,
    "use_rmsnorm": True,
    "wo_shift": False,
    "use_pos_embed": True,
}


def test_the_table_is_the_published_models() -> None:
    manifests = json.loads((GOLDEN / "manifests.json").read_text())
    assert manifests.keys() == CONFIGS.keys() | DECODER_CONFIGS.keys()
    for name, config in CONFIGS.items():
        assert DiTDHConfig.from_published(manifests[name]["config"]) == config, name
    for name, config in DECODER_CONFIGS.items():
        assert DecoderConfig(**manifests[name]["config"]) == config, name


def test_published_arguments_give_the_table_s_entry() -> None:
    assert DiTDHConfig.from_published(XL) == CONFIGS["DiTDH-XL-256"]
    assert DiTDHConfig.from_published({**XL, "num_heads": 16}) == CONFIGS["DiTDH-XL-256"]
    decoder = {
        "hidden_size": 768,
        "decoder_hidden_size": 1152,
        "decoder_num_hidden_layers": 28,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 4096,
        "patch_size": 16,
        "grid": 16,
    }
    assert DecoderConfig.from_published(decoder) == DECODER_CONFIGS["decoder-ViT-XL-256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wo_shift": True}, "wo_shift True is not supported: only False is"),
        ({"use_rope": False}, "use_rope False is not supported: only True is"),
        ({"patch_size": 2}, "patch_size 2 is not supported: only 1 is"),
        ({"learn_sigma": True}, "unknown key 'learn_sigma'"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob 1.5 is not in \[0, 1\)"),
        ({"depth": [0, 2]}, "depth 0 is not a positive integer"),
        ({"depth": [2.5, 2]}, "depth 2.5 is not a positive integer"),
        ({"use_rmsnorm": "false"}, "use_rmsnorm 'false' is not true or false"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio inf is not a positive number"),
    ],
)
def test_what_cannot_run_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTDHConfig.from_published({**XL, **change})
