"""What figures say of where they were measured; torch only where it is asked for, since a load's
generator spares it."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(found, platform.processor())


def gpu_name() -> str:
    """The first GPU's, without torch; nothing where there is none."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return output_of(query).partition("\n")[0]


def output_of(command: list[str]) -> str:
    """What a program says, if it is there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return "" if done.returncode else done.stdout.strip()


def commit() -> str:
    """Of the checkout, or what COMMIT says of a copy without one; nothing where neither does."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    return output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])


def machine(device: torch.device) -> dict[str, Any]:
    import torch

    facts = {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }
    if device.type == "cuda":
        import triton

        name = torch.cuda.get_device_name(device)
        facts |= {"device": name, "triton": triton.__version__, "cuda": torch.version.cuda}
    return facts
