"""The image, without a Docker engine: the Dockerfile is linted and read, and its steps are run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import yaml

from rae.server.serve import ANSWER_S
from rae.server.serve_settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
START_S, STOP_S, CHECK_S = 120, 60, 60
SECONDS = {"s": 1, "m": 60}


class Instruction(NamedTuple):
    name: str
    value: str


def stages() -> list[list[Instruction]]:
    """The instructions of the Dockerfile, each stage from its FROM on; the last is the image."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = (line.partition(" ") for line in text.replace("\\\n", "").splitlines() if line)
    found: list[list[Instruction]] = []
    for name, _, value in lines:
        if name == "FROM":
            found.append([])
        found[-1].append(Instruction(name, value))
    return found


def last(name: str) -> str:
    return [value for found, value in stages()[-1] if found == name][-1]


def pairs(value: str) -> dict[str, str]:
    """What ENV or LABEL sets."""
    return dict(pair.split("=", 1) for pair in shlex.split(value))


def health_check() -> tuple[dict[str, int], list[str]]:
    """Its times in seconds and its number of retries; its command."""
    flags, _, command = last("HEALTHCHECK").partition(" CMD ")
    values = re.findall(r"--([a-z-]+)=(\d+)([sm]?)", flags)
    return {name: int(n) * SECONDS.get(unit, 1) for name, n, unit in values}, json.loads(command)


def is_sent(path: PurePosixPath) -> bool:
    """Whether .dockerignore lets a path through: the last pattern decides that fits it or a folder
    that it is in."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        name = pattern.removeprefix("!")
        expression = re.escape(name).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(expression, str(part)) for part in (path, *path.parents)):
            sent = pattern.startswith("!")
    return sent


def context() -> set[PurePosixPath]:
    """The files that a build is sent; what is ignored at the top is not looked into."""
    top = [path for path in ROOT.iterdir() if is_sent(PurePosixPath(path.name))]
    below = (file for path in top for file in (path, *path.rglob("*")) if file.is_file())
    paths = (PurePosixPath(file.relative_to(ROOT).as_posix()) for file in below)
    return {path for path in paths if is_sent(path)}


def outer_environment(*prefixes: str) -> dict[str, str]:
    """This process's, without the variables that begin so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server: its URL, once it said that it is ready, and its process."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=folder)
    try:
        deadline = time.monotonic() + START_S
        while not (ready := re.search(r"^Ready: (\S+)", log.read_text(), re.MULTILINE)):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield ready[1], process
    finally:
        process.kill()
        process.wait(STOP_S)


def test_hadolint_has_no_complaint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_a_build_is_sent_the_package_and_what_installs_it() -> None:
    rooms = {package.split(".")[1] for package in PROJECT["tool"]["setuptools"]["packages"]}
    files = (file for room in rooms for file in (ROOT / room).rglob("*") if file.is_file())
    package = {PurePosixPath(file.relative_to(ROOT).as_posix()) for file in files}
    assert context() == {
        *(path for path in package if "__pycache__" not in path.parts),
        *map(PurePosixPath, ("LICENSE", "README.md", "constraints.txt", "pyproject.toml")),
    }


def test_arguments_are_those_of_rae_and_without_any_it_serves() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["rae"]
    assert json.loads(last("CMD")) == ["serve"]
    assert last("STOPSIGNAL") == "SIGTERM"
    assert last("EXPOSE") == pairs(last("ENV"))["RAE_PORT"]
    assert pairs(last("ENV"))["RAE_HOST"] == "0.0.0.0"


def test_the_user_is_a_number_and_owns_the_folders_that_are_written() -> None:
    user, group = last("USER").split(":")
    assert int(user) > 0 and group == "0"
    made = f"install -d -o {user} -g {group} -m 0775 {last('VOLUME')} {last('WORKDIR')}"
    assert apt_step().endswith(made)
    assert {pairs(last("ENV"))[name] for name in ("HOME", "XDG_CACHE_HOME")} == {last("VOLUME")}


def apt_step() -> str:
    """The one step of the image that is root's: Debian's packages, and folders of the user's."""
    (step,) = [v for name, v in stages()[-1] if name == "RUN" and v.startswith("apt-get ")]
    return step


def test_the_labels_are_those_of_the_package() -> None:
    project, prefix = PROJECT["project"], "org.opencontainers.image."
    assert pairs(last("LABEL")) == {
        f"{prefix}title": project["name"],
        f"{prefix}description": project["description"],
        f"{prefix}version": project["version"],
        f"{prefix}licenses": project["license"],
    }


def test_the_health_check_tells_a_server_from_a_dead_port(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    _, check = health_check()
    beside_python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**outer_environment("RAE_"), **pairs(last("ENV")), "PATH": beside_python}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment |= {"RAE_MODEL": str(tiny_checkpoint), "RAE_DEVICE": "cpu", "RAE_PORT": "0"}
    serve = [sys.executable, "-P", "-m", "rae.server", *json.loads(last("CMD"))]
    with running(serve, environment, tmp_path) as (url, process):
        served = {**environment, "RAE_PORT": str(urlsplit(url).port)}
        assert subprocess.run(check, env=served, timeout=CHECK_S).returncode == 0
        process.terminate()
        assert process.wait(STOP_S) == 0
        done = subprocess.run(check, env=served, timeout=CHECK_S, capture_output=True)
        assert done.returncode == 1 and b"ConnectionRefusedError" in done.stderr


def test_the_health_check_tells_a_server_from_something_else() -> None:
    _, check = health_check()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        environment = {**os.environ, "RAE_PORT": port}
        with subprocess.Popen(check, env=environment) as process:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(1000).startswith(b"GET /health/live HTTP/1.1\r\n")
                connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
                assert process.wait(CHECK_S) == 1


def test_nobody_ends_a_server_that_drains() -> None:
    times, _ = health_check()
    assert (times["retries"] - 1) * times["interval"] > ServeSettings.grace
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["rae"]
    assert int(service["stop_grace_period"].removesuffix("s")) > ServeSettings.grace + ANSWER_S
    assert service["volumes"] == [f"cache:{last('VOLUME')}"]
    assert service["ports"] == ["127.0.0.1:8000:" + last("EXPOSE")]


def copy(arguments: str, roots: Mapping[str, Path], workdir: Path) -> None:
    """COPY of what the build is sent, or of files and folders of an earlier stage."""
    *sources, target = [word for word in arguments.split() if not word.startswith("--")]
    stage = re.match(r"--from=(\S+)", arguments)
    if not stage:
        assert (sources, target) == (["."], ".")
        for path in context():
            (workdir / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, workdir / path)
        return
    for source in (roots[stage[1]] / path.lstrip("/") for path in sources):
        if source.is_dir():
            shutil.copytree(source, workdir / target)
        else:
            shutil.copy(source, workdir / target)


def build(folder: Path) -> tuple[Path, dict[str, str]]:
    """Runs the Dockerfile's steps but those of apt-get, which need a machine of their own. A folder
    stands for each stage's file system, a venv in it for its Python.

    Returns the folder in which the image starts, and its environment.
    """
    roots: dict[str, Path] = {}
    root = workdir = folder
    environment: dict[str, str] = {}
    for stage in stages():
        root = folder / stage[0].value.split()[-1].replace(":", "-")
        roots[root.name] = root
        subprocess.run([sys.executable, "-m", "venv", root / "usr/local"], check=True)
        environment = outer_environment("RAE_", "PYTHON", "TRITON")
        environment["PATH"] = f"{root / 'usr/local/bin'}{os.pathsep}{environment['PATH']}"
        for name, value in stage:
            if name == "WORKDIR":
                workdir = root / value.lstrip("/")
                workdir.mkdir(parents=True, exist_ok=True)
            elif name == "COPY":
                copy(value, roots, workdir)
            elif name == "RUN" and value != apt_step():
                step = re.sub(r"^--mount=\S+\s+", "", value)
                pip = {**environment, "PIP_NO_CACHE_DIR": "1"}
                subprocess.run(["/bin/sh", "-c", step], cwd=workdir, env=pip, check=True)
            elif name == "ENV":
                environment |= pairs(value)
    for name in ("HOME", "XDG_CACHE_HOME"):
        environment[name] = str(root / environment[name].lstrip("/"))
    return workdir, environment


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    try:
        yield build(tmp_path)
    finally:
        shutil.rmtree(tmp_path)  # pytest would keep the 5.6 GB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_of_the_dockerfile_make_a_server(image: tuple[Path, dict[str, str]]) -> None:
    workdir, environment = image
    command = [*json.loads(last("ENTRYPOINT")), *json.loads(last("CMD"))]
    with running(command, {**environment, "RAE_PORT": "0"}, workdir) as (url, process):
        headers = {"content-type": "application/json"}
        asked = Request(f"{url}/generate", json.dumps({"class_id": 7}).encode(), headers)
        with urlopen(asked, timeout=60) as answer:
            assert answer.headers["content-type"] == "image/png"
            assert answer.read().startswith(b"\x89PNG\r\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    assert any(Path(environment["XDG_CACHE_HOME"]).rglob("*")), "nothing was kept in the volume"
