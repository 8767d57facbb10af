"""Stage 1 on two processes: λ, and the discriminator's gradients too, are the global batch's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_tiny_decoder import train

from rae.training.distributed import World

SCRIPT = Path(__file__).parent / "train_tiny_decoder.py"


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return train(World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_are_one_with_the_double_batch(
    alone: dict[str, Tensor], strategy: str, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path / "weights.safetensors")]
    processes = [
        subprocess.Popen(
            [*command, "--strategy", strategy],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert not any(process.returncode for process in processes), outputs
    both = load_file(tmp_path / "weights.safetensors")
    assert set(both) == set(alone) and any(name.startswith("discriminator.") for name in both)
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=1e-5, msg=name)
