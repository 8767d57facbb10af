"""Classes by name, over HTTP and from the command, where names have synonyms and are shared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner, Result

from rae.models.checkpoint_config import SamplerDefaults
from rae.models.labels import imagenet_classes
from rae.server.cli import app
from rae.server.errors import InvalidRequestError
from rae.server.limits import Limits
from rae.server.schemas import read_request, request_body

NAMES = ("crane, crane bird", "golden retriever", "crane", "tiger, Panthera tigris")
IMAGENET = Limits(
    classes=imagenet_classes(),
    defaults=SamplerDefaults(),
    has_null_label=True,
    methods=("cfg",),
    max_steps=100,
    max_images=4,
)


@pytest.fixture(scope="module")
def named_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": NAMES}))
    return folder


@pytest.fixture(scope="module")
def named_client(
    make_client: Callable[..., AbstractContextManager[TestClient]], named_checkpoint: Path
) -> Iterator[TestClient]:
    with make_client(named_checkpoint) as client:
        yield client


def rae(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        ({"class_name": "golden retriever"}, 207),
        ({"class_name": "Golden-Retriever"}, 207),
        ({"class_name": "Panthera tigris"}, 292),
        ({"class_name": "tiger, panthera tigris"}, 292),
        ({"class_name": "harp"}, 594),
        ({"class_name": "harp", "class_id": 593}, 593),  # the harmonica, also a mouth harp
        ({"class_name": "crane", "class_id": 517}, 517),
        ({"class_name": "crane bird"}, 134),
        ({"class_id": 207}, 207),
        ({}, 1000),
    ],
)
def test_accepted(asked: dict[str, object], label: int) -> None:
    specs = read_request(asked | {"n": 2}, IMAGENET).specs(IMAGENET)
    assert [spec.class_label for spec in specs] == [label, label]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"class_name": "Crane"},
            'class_name is "Crane"; allowed: give class_id: 134 and 517 have this name',
        ),
        (
            {"class_name": "harp", "class_id": 207},
            'class_id is 207 beside class_name "harp"; allowed: 594, or none',
        ),
        (
            {"class_name": "golden"},
            'class_name is "golden"; allowed: a class; closest: golden retriever (207); '
            "GET /classes lists all",
        ),
        (
            {"class_name": "golden retreiver"},
            'class_name is "golden retreiver"; allowed: a class; closest: golden retriever (207), '
            "Labrador retriever (208), Gordon setter (214); GET /classes lists all",
        ),
        (
            {"class_name": "xyzzy"},
            'class_name is "xyzzy"; allowed: one of tench, goldfish, great white shark, tiger '
            "shark, hammerhead, electric ray, stingray, cock, hen, ostrich, brambling, goldfinch, "
            "…; GET /classes lists all, or null for unconditional",
        ),
    ],
)
def test_refused(asked: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_request(asked, IMAGENET)
    assert str(caught.value) == message


def test_few_classes_are_all_named_to_who_misspells_one() -> None:
    digits = replace(IMAGENET, classes=("zero", "one", "two"), has_null_label=False)
    with pytest.raises(InvalidRequestError) as caught:
        read_request({"class_name": "zer"}, digits)
    assert str(caught.value) == 'class_name is "zer"; allowed: one of zero, one, two'


def test_the_documented_examples_work() -> None:
    examples = request_body(IMAGENET)["content"]["application/json"]["examples"]
    assert examples["the same image each time"]["value"]["class_name"] == "cock"
    labels = [
        read_request(example["value"], IMAGENET).specs(IMAGENET)[0].class_label
        for example in examples.values()
    ]
    assert labels == [7, 7, 7, 7, 1000]


def test_a_synonym_makes_the_same_image_and_the_image_keeps_all_names(
    named_client: TestClient,
) -> None:
    asked = {"seed": 5, "steps": 3}
    by_id = named_client.post("/generate", json=asked | {"class_id": 3})
    by_name = named_client.post("/generate", json=asked | {"class_name": "panthera_tigris"})
    other = named_client.post("/generate", json=asked | {"class_name": "golden retriever"})
    assert by_id.status_code == other.status_code == 200
    assert by_name.content == by_id.content != other.content
    metadata = json.loads(Image.open(BytesIO(by_name.content)).info["rae"])
    assert (metadata["class_id"], metadata["class_name"]) == (3, "tiger, Panthera tigris")
    again = {key: metadata[key] for key in ("class_id", "class_name", "seed", "steps")}
    assert named_client.post("/generate", json=again).content == by_id.content


def test_a_shared_name_is_refused_over_http(named_client: TestClient) -> None:
    response = named_client.post("/generate", json={"class_name": "crane"})
    assert response.status_code == 422
    (detail,) = response.json()["error"]["details"]
    assert detail == {
        "field": "class_name",
        "value": '"crane"',
        "allowed": "give class_id: 0 and 2 have this name",
    }


@pytest.mark.parametrize(
    ("path", "labels"),
    [
        ("/classes", [0, 1, 2, 3]),
        ("/classes?search=", [0, 1, 2, 3]),
        ("/classes?search=crane", [0, 2]),
        ("/classes?search=crane+bird", [0]),
        ("/classes?search=tigris", [3]),
        ("/classes?search=3", [3]),
        ("/classes?search=dog", []),
        ("/classes?search=%ff", []),
    ],
)
def test_search_over_http(named_client: TestClient, path: str, labels: list[int]) -> None:
    response = named_client.get(path)
    assert response.status_code == 200
    assert response.json() == [{"class_id": i, "name": NAMES[i]} for i in labels]


def test_search_is_documented(named_client: TestClient) -> None:
    route = named_client.get("/openapi.json").json()["paths"]["/classes"]["get"]
    (parameter,) = route["parameters"]
    assert (parameter["name"], parameter["required"]) == ("search", False)


def test_the_command_finds_imagenets_classes() -> None:
    result = rae("classes", "--imagenet", "golden", "retriever")
    assert (result.exit_code, result.stdout) == (0, "207  golden retriever\n")
    found = rae("classes", "--imagenet", "crane").stdout.splitlines()
    assert found == ["134  crane, crane bird", "517  crane"]
    lines = rae("classes", "--imagenet").stdout.splitlines()
    assert lines == [f"{i}  {name}" for i, name in enumerate(imagenet_classes())]


def test_the_command_lists_a_checkpoints_classes(
    named_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rae("classes", "7").stdout == "7  seven\n"
    assert rae("classes", "--model", named_checkpoint, "tigris").stdout.splitlines() == [
        "3  tiger, Panthera tigris"
    ]
    monkeypatch.setenv("RAE_MODEL", str(named_checkpoint))
    assert rae("classes").stdout.splitlines() == [f"{i}  {name}" for i, name in enumerate(NAMES)]
    assert rae("classes", "--imagenet", "207").stdout == "207  golden retriever\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seventeen"], 'no class matches "seventeen"; closest are seven (7)'),
        (["xyzzy", "x"], 'no class matches "xyzzy x"'),
        (
            ["--imagenet", "golden retreiver"],
            'no class matches "golden retreiver"; closest are golden retriever (207), '
            "Labrador retriever (208), Gordon setter (214)",
        ),
        (["--model", "tests"], "tests is not a checkpoint folder: no readable config.json"),
    ],
)
def test_the_command_says_that_nothing_matches(arguments: list[str], message: str) -> None:
    result = rae("classes", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {message}\n"


def test_imagenets_names_are_listed_without_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from rae.server.cli import main\n"
        "sys.argv = ['rae', 'classes', '--imagenet', '207']; main()"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"207  golden retriever\n"), done.stderr.decode()


def test_generate_takes_any_name_and_files_have_the_first(
    named_checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--model", named_checkpoint, "--device", "cpu", "--out", tmp_path]
    flags += ["--seed", "5", "--steps", "2"]
    result = rae("generate", "golden retriever", "PANTHERA TIGRIS", "0", *flags)
    assert result.exit_code == 0, result.output
    names = ["1-golden-retriever-seed5.png", "3-tiger-seed5.png", "0-crane-seed5.png"]
    assert result.stdout.splitlines() == [f"{tmp_path / name} (seed 5)" for name in names]
    with Image.open(tmp_path / names[1]) as image:
        assert json.loads(image.info["rae"])["class_name"] == "tiger, Panthera tigris"


def test_generate_takes_a_number_for_a_name_where_there_is_one(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / "config.json"
    names = ["3, three", "one", "two", "zero"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": names}))
    flags = ["--model", folder, "--out", tmp_path, "--seed", "5", "--steps", "2"]
    assert rae("generate", "3", "2", *flags).stdout.splitlines() == [
        f"{tmp_path / '0-3-seed5.png'} (seed 5)",
        f"{tmp_path / '2-two-seed5.png'} (seed 5)",
    ]
