"""Stage 1 on two processes: λ, and the discriminator's gradients too, are the global batch's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file
from torch import Tensor
from train_tiny_decoder import train

from rae.training.distributed import Strategy, World

SCRIPT = Path(__file__).parent / "train_tiny_decoder.py"


def test_two_processes_are_one_with_the_double_batch(tmp_path: Path) -> None:
    alone = train(World(0, 1, torch.device("cpu")))
    for both in two_processes(tmp_path):
        assert set(both) == set(alone) and any(name.startswith("discriminator.") for name in both)
        for name, value in alone.items():
            torch.testing.assert_close(both[name], value, rtol=0, atol=1e-5, msg=name)


def two_processes(folder: Path) -> list[dict[str, Tensor]]:
    """The weights that they end with, replicated and sharded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(SCRIPT), str(folder)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [load_file(folder / f"{strategy}.safetensors") for strategy in get_args(Strategy)]
