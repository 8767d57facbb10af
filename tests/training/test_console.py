"""What commands tell people: one line, an exit code, and a bar of the first process alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from rae.training.console import clear_errors, progress
from rae.training.trainer import DivergedError, StoppedError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("too\n  many"), 2, "Error: too many"),
        (OSError("full"), 1, "Error: full"),
        (ImportError("needs timm"), 1, "Error: needs timm"),
        (ModuleNotFoundError(name="timm"), 1, "Error: timm is missing: pip install"),
        (DivergedError("nan"), 1, "Error: nan"),
        (StoppedError(15), 143, "Stopped by SIGTERM, and saved"),
        (KeyboardInterrupt(), 130, "Gone."),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    with pytest.raises(typer.Exit) as exit_, clear_errors("Gone."):
        raise error
    assert exit_.value.exit_code == code
    told = capsys.readouterr()
    assert told.err.startswith(line) and told.err.count("\n") == 1 and not told.out


@pytest.mark.parametrize("error", [RuntimeError("a bug"), typer.Exit(3), KeyError("a bug")])
def test_bugs_and_exits_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, clear_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(("rank", "shown"), [(0, "12/20"), (1, "")])
def test_the_first_process_counts_for_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int, shown: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    with progress(rank, size=2) as track:
        track("encode", 20)(6)
    told = capsys.readouterr()
    assert shown in told.err and bool(told.err) == bool(shown) and not told.out


def test_it_loads_without_torch() -> None:
    code = (
        "import sys, rae.training.console; assert not {'torch', 'rich.progress'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
