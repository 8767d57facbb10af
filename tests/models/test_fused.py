"""The layers on the kernels: the plain ones' numbers, whatever implementation runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.parity import GOLDEN_FOLDER, Setup, check_folder
from rae.models.config import DecoderConfig, DiTDHConfig
from rae.models.dit_dh import DiTDH
from rae.models.fused import fuse
from rae.models.rae import RAE

SMALL = DiTDHConfig(
    latent_channels=32,
    latent_size=4,
    hidden_size=96,
    depth=2,
    num_heads=4,
    head_hidden_size=128,  # SwiGLU's hidden size is 341 then, odd as at width 2048
    head_depth=1,
    head_num_heads=2,
    num_classes=4,
)
