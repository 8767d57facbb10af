"""Where Triton has no wheels, as on a Mac, the embedded model generates all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_an_image_is_generated_without_triton(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from rae.server.cli import main\n"
        f"sys.argv = ['rae', 'generate', '7', '--steps', '3', '--out', {str(tmp_path)!r}]\n"
        "main()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("*.png"))) == 1
