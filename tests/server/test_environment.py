"""A misspelt variable is said at the start, and never what is in it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

from rae.server.environment import known_variables, unknown_variables
from rae.server.serve_settings import ServeSettings


def test_each_setting_is_known() -> None:
    settings = {f"RAE_{field.name.upper()}" for field in fields(ServeSettings)}
    assert set(known_variables()) == settings | {"RAE_API_KEYS"}
    assert list(unknown_variables([*known_variables(), "PATH", "MAX_BATCH", "XRAE_PORT"])) == []


def test_the_closest_one_is_named() -> None:
    assert list(unknown_variables(["RAE_PORTS", "RAE_MAXBATCH", "RAE_API_KEY", "RAE_ZZZ"]))[:3] == [
        "RAE_API_KEY is set, but nothing reads it; the closest that is read is RAE_API_KEYS",
        "RAE_MAXBATCH is set, but nothing reads it; the closest that is read is RAE_MAX_BATCH",
        "RAE_PORTS is set, but nothing reads it; the closest that is read is RAE_PORT",
    ]
    assert len(list(unknown_variables(["RAE_", "RAE_ZZZ"]))) == 2


def test_rae_serve_warns(child_environment: dict[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--trusted-proxies", "here"]
    environment = child_environment | {"RAE_API_KEY": "alice:0123456789abcdef"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 1
    warning, error = done.stderr.decode().splitlines()
    assert warning.endswith(next(unknown_variables(["RAE_API_KEY"])))
    assert " WARNING " in warning
    assert error.startswith("Error: trusted-proxies has 'here'; allowed: addresses and networks")
