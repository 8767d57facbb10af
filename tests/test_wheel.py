"""What an installed rae-server consists of."""

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "models", "server", "training")


def copy_source(target: Path) -> None:
    """Copies what a build reads, without the build folders that may lie in a working tree."""
    target.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, target)
    for folder in (*ROOMS, "tests", "benchmarks"):
        if (ROOT / folder).exists():
            ignore = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(ROOT / folder, target / folder, ignore=ignore)


def test_the_wheel_holds_the_rooms_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    copy_source(source)
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = tmp_path.glob("rae_server-*-py3-none-any.whl")
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert "rae = rae.server.cli:main" in archive.read(metadata).decode()
    inside = {name for name in names if ".dist-info/" not in name}
    files = {path for room in ROOMS for path in (source / room).rglob("*") if path.is_file()}
    assert inside == {f"rae/{path.relative_to(source).as_posix()}" for path in files}
