"""ImageNet's names against another list of them, and what is found by them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rae.models.labels import (
    IMAGENET_FILE,
    closest,
    find_labels,
    first_name,
    has_name,
    imagenet_classes,
    search,
    shortlist,
)

KNOWN = {
    0: "tench, Tinca tinca",
    1: "goldfish, Carassius auratus",
    134: "crane, crane bird",
    207: "golden retriever",
    360: "otter",
    388: "giant panda, panda, panda bear, coon bear, Ailuropoda melanoleuca",
    517: "crane",
    999: "toilet tissue, toilet paper, bathroom tissue",
}
# torchvision makes the two cranes and the two maillots differ, and gives no synonyms.
OTHERWISE_IN_TORCHVISION = {134: "crane bird", 639: "maillot tank suit"}
FEW = ("St. Bernard, Saint_Bernard", "cat", "wild-cat", "-", "house of cats", "bobcat", "cat flap")


def test_the_file_is_in_label_order_and_names_its_source() -> None:
    lines = IMAGENET_FILE.read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    ids = [line.split("\t")[0] for line in lines[len(comments) :]]
    assert len(ids) == len(set(ids)) == 1000
    assert ids == sorted(ids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdecimal() for wnid in ids)
    assert (ids[0], ids[207], ids[999]) == ("n01440764", "n02099601", "n15075141")
    assert "WordNet 3.0 Copyright 2006 by Princeton University." in "".join(comments)


def test_imagenet_names() -> None:
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert {label: classes[label] for label in KNOWN} == KNOWN
    for string in classes:
        names = string.split(", ")
        assert all(names) and string == ", ".join(name.strip() for name in names)
        assert len(names) == len(set(names))


def test_first_names_are_torchvisions() -> None:
    meta = pytest.importorskip("torchvision.models._meta")
    theirs = meta._IMAGENET_CATEGORIES
    ours = [first_name(string) for string in imagenet_classes()]
    differing = {i: theirs[i] for i in range(1000) if ours[i] != theirs[i]}
    assert differing == OTHERWISE_IN_TORCHVISION


def test_names_need_neither_torch_nor_a_read_at_import() -> None:
    script = (
        "import sys\n"
        "from rae.models import labels\n"
        "assert labels.imagenet_classes.cache_info().currsize == 0\n"
        "assert labels.imagenet_classes()[207] == 'golden retriever'\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("golden retriever", [207]),
        ("Golden_RETRIEVER", [207]),
        ("  golden-retriever ", [207]),
        ("Tinca tinca", [0]),
        ("tench, tinca tinca", [0]),
        ("tench, Tinca", []),
        ("tench,Tinca tinca", []),
        ("crane", [134, 517]),
        ("crane bird", [134]),
        ("maillot", [638, 639]),
        ("maillot, tank suit", [639]),
        ("cardigan", [264, 474]),
        # One class's only or first name, and a synonym of another's.
        ("harp", [594]),
        ("crayfish", [124]),
        ("partridge", [86]),
        # A synonym of several classes, and of no class the first name.
        ("panda", [387, 388]),
        ("wagon", [436, 734]),
        ("golden", []),
        ("207", []),
        ("", []),
        (",", []),
        ("\ud800", []),
    ],
)
def test_find_labels(name: str, labels: list[int]) -> None:
    assert find_labels(imagenet_classes(), name) == labels


def test_every_class_is_found_by_its_string_and_has_its_names() -> None:
    classes = imagenet_classes()
    for label, string in enumerate(classes):
        assert label in find_labels(classes, string)
        assert all(has_name(string, name) for name in string.upper().split(","))
    assert not has_name(classes[207], "golden")


@pytest.mark.parametrize(
    ("query", "labels"),
    [
        ("cat", [1, 6, 2, 4, 5]),  # exact, prefix, words (an earlier class first), substring
        ("2", [2]),
        (" 2 ", [2]),
        ("cats house", [4]),
        ("cat flap", [6]),
        ("cat at", [1, 2, 4, 5, 6]),  # no word begins with "at": all are substrings
        ("house dog", []),
        ("saint bernard", [0]),
        ("bernard saint", [0]),
        ("-", [3]),
        ("7", []),
        ("", [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_search_ranks(query: str, labels: list[int]) -> None:
    assert search(FEW, query) == labels


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("golden", [207]),
        ("golden retriever", [207]),
        ("retriever, golden", [207]),
        ("207", [207]),
        ("crane", [134, 517]),
        ("harp", [594, 593]),
        ("tiger", [292, 3, 282, 300]),
        ("retriever", [205, 206, 207, 208, 209]),
        ("jack o lantern", [607]),
        ("aluropoda melanoleuca", []),
    ],
)
def test_search_of_imagenet(query: str, first: list[int]) -> None:
    assert search(imagenet_classes(), query)[: max(len(first), 1)] == first


def test_an_id_comes_before_a_name_that_holds_it() -> None:
    assert search(("747", "boeing 1", "airbus"), "1") == [1]
    assert search(("1", "747", "airbus 1"), "1") == [1, 0, 2]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("golden retreiver", [207, 208, 214]),
        ("zebar", [340]),
        ("pnada", [387, 388]),
        ("retriever", [205, 206, 207]),
        ("xyzzy", []),
        ("", [0, 1, 2]),
        ("x" * 60_000, []),
    ],
)
def test_closest(name: str, labels: list[int]) -> None:
    assert closest(imagenet_classes(), name)[: max(len(labels), 1)] == labels


def test_people_see_first_names_and_ids() -> None:
    classes = imagenet_classes()
    assert shortlist(classes, [134, 517]) == "crane (134), crane (517)"
    assert shortlist(classes, range(1000)).endswith("hammerhead (4)")
    assert shortlist(classes, []) == ""
