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


def commit() -> str:
    """Of the checkout, or what COMMIT says of a copy without one; nothing where neither does."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        return ""


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
