"""Published models by name: a hub on this machine serves them to huggingface_hub's own client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from rae.models.checkpoint import load_checkpoint
from rae.models.hub import HUB_NAME

if TYPE_CHECKING:
    from authors_folder import AuthorsFolder

REPOSITORY = "someone/RAE-collections"
COMMIT = "c" * 40
CUT_FILE = "DiTs/stage2_model.pt"
# The published presets are of 6 GB: one of the recorded model's size is put beside them.
RUN = """
import sys
from pathlib import Path
from rae.models import published, published_yaml
root = Path(sys.argv.pop(1))
model = published_yaml.read_yaml(root / "model.yaml", Path())
published.PRESETS["tiny"] = model
from rae.server.cli import main
sys.argv[0] = "rae"
main()
"""


class Hub(BaseHTTPRequestHandler):
    """What the client asks of a hub. The first GET of CUT_FILE ends half-way."""

    root: Path
    seen: list[str]

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def answer(self, *, with_body: bool) -> None:
        ranged = self.headers.get("Range", "")
        self.seen.append(f"{self.command} {self.path} {ranged}".strip())
        if self.path.startswith("/api/"):
            is_tree = "/tree/" in self.path
            answer = self.tree() if is_tree else {"id": REPOSITORY, "sha": COMMIT, "siblings": []}
            body = json.dumps(answer).encode()
            return self.send(200, body, {"Content-Type": "application/json"})
        path = self.root / self.path.partition(f"/resolve/{COMMIT}/")[2]
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if not with_body:
            return self.send(200, b"", {**headers, "Content-Length": str(len(data))})
        start = int(ranged.removeprefix("bytes=").partition("-")[0]) if ranged else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if str(path).endswith(CUT_FILE) and not start:
            self.send(200, body[: len(body) // 2], {**headers, "Content-Length": str(len(body))})
            self.close_connection = True
            return None
        return self.send(206 if start else 200, body, headers)

    def tree(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": path.relative_to(self.root).as_posix(),
                "size": path.stat().st_size,
                "oid": "0" * 40,
            }
            for path in self.root.rglob("*")
            if path.is_file()
        ]

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def put_into_40_mb(tensors: dict[str, Tensor]) -> None:
    """A view is saved with all of what it views; the client resumes in steps of 10 MB."""
    table = tensors["pos_embed"]
    large = torch.zeros(10_000_000)
    large[: table.numel()] = table.flatten()
    tensors["pos_embed"] = large[: table.numel()].view_as(table)


@pytest.fixture
def hub(authors_folder: AuthorsFolder) -> Iterator[ThreadingHTTPServer]:
    assert authors_folder.yaml.is_file()
    authors_folder.edit_weights(CUT_FILE, put_into_40_mb)
    handler = type("TheHub", (Hub,), {"root": authors_folder.root, "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def rae(
    folder: Path, home: Path, port: int, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    address = f"http://127.0.0.1:{port}"
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", RUN, str(folder), *arguments],
        env={**os.environ, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_model_is_downloaded_resumed_and_converted_once(
    hub: ThreadingHTTPServer, authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    root, home, port = authors_folder.root, tmp_path / "home", hub.server_port
    seen = vars(hub.RequestHandlerClass)["seen"]
    name = f"{REPOSITORY}:tiny"
    first = rae(root, home, port, "classes", "--model", name)
    assert first.returncode == 0, first.stderr
    assert "class 9" in first.stdout
    gets = [line for line in seen if line.startswith(f"GET /{REPOSITORY}/resolve")]
    wanted = {"DiTs/stage2_model.pt", "DiTs/guide.pt", "decoder/model.pt", "stat.pt"}
    assert {line.split()[1].partition(f"{COMMIT}/")[2] for line in gets} == wanted
    assert any(CUT_FILE in line and "bytes=" in line for line in gets)
    checkpoint = load_checkpoint(home / "rae-server" / "someone--RAE-collections" / "tiny")
    assert checkpoint.config.source == f"hub {REPOSITORY}"
    seen.clear()
    again = rae(root, home, port, "classes", "--model", name)
    assert again.returncode == 0 and again.stdout.endswith(first.stdout[-20:])
    assert not seen


def test_from_hub_converts_into_a_folder(
    hub: ThreadingHTTPServer, authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    result = rae(
        authors_folder.root,
        tmp_path / "home",
        hub.server_port,
        *("convert", "--preset", "tiny", "--from-hub", "--out", str(tmp_path / "out")),
    )
    assert result.returncode == 0, result.stderr
    load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_without_a_network_the_files_to_place_are_listed(
    authors_folder: AuthorsFolder, tmp_path: Path, offline: dict[str, str]
) -> None:
    assert authors_folder.yaml.is_file()
    result = rae(
        authors_folder.root,
        tmp_path / "home",
        1,  # nobody listens
        *("serve", "--model", "nyu-visionx/RAE-collections:DiTDH-XL-256"),
        **offline,
    )
    assert result.returncode == 1
    message = " ".join(result.stderr.split())
    assert "Traceback" not in message
    assert "nyu-visionx/RAE-collections cannot be downloaded" in message
    assert "rae convert --preset DiTDH-XL-256 --root DIR --out FOLDER" in message
    for file in ("ImageNet256/DiTDH-XL/stage2_model.pt", "dinov2/wReg_base/imagenet1k/stat.pt"):
        assert file in message.replace(" ", "")


def test_what_is_neither_a_folder_nor_a_name_is_said(
    authors_folder: AuthorsFolder, tmp_path: Path
) -> None:
    assert authors_folder.yaml.is_file()
    for name in (REPOSITORY, "DiTDH-XL-256"):
        result = rae(authors_folder.root, tmp_path, 1, "classes", "--model", name)
        assert result.returncode == 1
        message = " ".join(result.stderr.split())
        assert "does not exist. A published model is nyu-visionx/RAE-collections:PRESET" in message


def test_an_unknown_preset_is_named(authors_folder: AuthorsFolder, tmp_path: Path) -> None:
    assert authors_folder.yaml.is_file()
    result = rae(authors_folder.root, tmp_path, 1, "classes", "--model", "someone/x:DiTDH-XXL")
    assert result.returncode == 1 and "preset 'DiTDH-XXL'; known: DiTDH-XL-256" in result.stderr


def test_what_is_a_hub_name() -> None:
    match = HUB_NAME.fullmatch("nyu-visionx/RAE-collections:DiTDH-XL-256")
    assert match and match["preset"] == "DiTDH-XL-256"
    for text in ("a/b", "C:/models/a:b/c", "/a/b:c", "a/b/c:d", "../b:c/d"):
        assert HUB_NAME.fullmatch(text) is None, text
