"""A `rae serve` of its own under test: its processes, their memory, its log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from http_client import Client

from rae.server.settings import embedded_model

READY_TIMEOUT_S = 600
STOP_TIMEOUT_S = 45
WORKER = "rae.server.worker"
SERVE_HELP = (
    "a flag for `rae serve`: --serve=--deterministic on a GPU, where the bits of an image may "
    "otherwise depend on how many others are in its steps"
)


def split_cores() -> tuple[set[int], set[int]]:
    """The cores of the load's generator and of the server: one, and the others where there are."""
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None for a process that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields


def children_of(pid: int) -> list[int]:
    """The processes below `pid`, at any depth."""
    parents = {}
    for path in Path("/proc").iterdir():
        fields = stat_of(int(path.name)) if path.name.isdigit() else None
        if fields:
            parents[int(path.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


class LiveServer:
    """A server process. `port` is known where it was given, and once the server is ready."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], port: int) -> None:
        self.process, self.log, self.port = process, log, port
        self.host = "127.0.0.1"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def text(self) -> str:
        """All that it has written so far."""
        return os.pread(self.log.fileno(), os.fstat(self.log.fileno()).st_size, 0).decode()

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with what it wrote where it ends or takes too long."""
        end = time.monotonic() + READY_TIMEOUT_S
        while not (found := re.search(r"^Ready: http://[^:]+:(\d+)", self.text, re.MULTILINE)):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"rae serve is not ready: {self.text[-2000:]}")
            time.sleep(0.02)
        self.port = int(found[1])

    def client(self, source: str = "") -> Client:
        return Client(self.host, self.port, source)

    def pids(self) -> list[int]:
        return [self.pid, *children_of(self.pid)]

    def workers(self) -> list[int]:
        return [pid for pid in children_of(self.pid) if WORKER in command_of(pid)]

    def catches(self, number: signal.Signals) -> bool:
        """Whether a handler of its own stands for the signal."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = int(re.findall(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[0], 16)
        return bool(caught >> (number - 1) & 1)

    def usage(self) -> dict[str, float]:
        """Of all its processes together; `api_rss_mb` is the first one's own."""
        names = ("processes", "rss_mb", "api_rss_mb", "threads", "fds", "cpu_s")
        total: dict[str, float] = dict.fromkeys(names, 0.0)
        for pid in self.pids():
            stat = stat_of(pid)
            try:
                status = Path(f"/proc/{pid}/status").read_text()
                fds = len(os.listdir(f"/proc/{pid}/fd"))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stat is None:
                continue
            numbers = dict(re.findall(r"^(VmRSS|Threads):\s*(\d+)", status, re.MULTILINE))
            total["processes"] += 1
            rss_mb = int(numbers.get("VmRSS", 0)) / 1024
            total["rss_mb"] += rss_mb
            total["api_rss_mb"] += rss_mb * (pid == self.pid)
            total["threads"] += int(numbers.get("Threads", 0))
            total["fds"] += fds
            total["cpu_s"] += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return total

    def stop(self) -> tuple[int | None, int]:
        """SIGTERM: the exit code, None where there was none in time, and how many of its processes
        it left behind, which are then killed."""
        pids = self.pids()
        self.process.send_signal(signal.SIGTERM)
        return self.wait(STOP_TIMEOUT_S), self.kill(pids)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, None where it does not end in time."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, pids: Sequence[int]) -> int:
        """End those of its processes `pids` that are left, and say how many these were."""
        left = [pid for pid in pids if stat_of(pid)]
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return len(left)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@contextmanager
def start_server(
    folder: Path | None, flags: Sequence[str] = (), *, port: int = 0
) -> Iterator[LiveServer]:
    """`rae serve` on the cores that `split_cores` gives it; this process stays on the others.

    It is killed at the end of the context where it was not stopped before.
    """
    command = [sys.executable, "-P", "-m", "rae.server", "serve", "--log-level", "warning"]
    command += ["--model", str(folder or embedded_model()), "--port", str(port), *flags]
    outer = {key: value for key, value in os.environ.items() if not key.startswith("RAE_")}
    all_cores = os.sched_getaffinity(0)
    own, others = split_cores()
    with tempfile.TemporaryFile() as log:
        os.sched_setaffinity(0, others)  # a child has its parent's
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env={"GOMP_SPINCOUNT": "1000"} | outer
            )
        finally:
            os.sched_setaffinity(0, own)
        server = LiveServer(process, log, port)
        try:
            yield server
        finally:
            if process.poll() is None:
                server.kill(server.pids())
            os.sched_setaffinity(0, all_cores)
