"""The names of classes: ImageNet's, and how a person's words find one among any checkpoint's.

A class is one string, its names separated by commas: "tiger, Panthera tigris". Case does not count,
and spaces, underscores and hyphens are alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache, lru_cache
from pathlib import Path

IMAGENET_FILE = Path(__file__).parent / "imagenet_classes.txt"
SUGGESTIONS = 5


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 classes of ILSVRC-2012 in label order: what a checkpoint of ImageNet names."""
    lines = IMAGENET_FILE.read_text(encoding="utf-8").splitlines()
    return tuple(line.partition("\t")[2] for line in lines if not line.startswith("#"))


def first_name(name: str) -> str:
    """The first of a class's names, for where there is no room for all."""
    return name.partition(",")[0].strip()


def shortlist(classes: tuple[str, ...], labels: Sequence[int]) -> str:
    """The first few of `labels` for people: "crane (134), crane (517)"."""
    return ", ".join(f"{first_name(classes[i])} ({i})" for i in labels[:SUGGESTIONS])


def find_labels(classes: tuple[str, ...], name: str) -> list[int]:
    """The classes that are called `name`, which is a whole string or one of a class's names.

    Who has it as first name hides who has it as synonym: "harp" is the harp and not the mouth
    harp. There are several where that does not decide, as of the two cranes of ImageNet.
    """
    wanted, keys = _normal(name), _keys(classes)
    found = [i for i, own in enumerate(keys) if wanted in own]
    return [i for i in found if wanted == keys[i][0]] or found


def has_name(string: str, name: str) -> bool:
    """Whether `name` is a class's whole string or any of its names."""
    return _normal(name) in _class_keys(string)


def search(classes: tuple[str, ...], query: str) -> list[int]:
    """The classes that `query` may mean, the likeliest first; all of them for an empty one.

    First the class of this id, then a name that is the query, one that begins with it, one whose
    words begin with the query's words, and one that holds them. Among equals, the class where it
    is an earlier name. A class in which a word of the query does not occur is left out.
    """
    wanted = _normal(query)
    words = tuple(dict.fromkeys(wanted.replace(",", " ").split()))
    ranked = [
        ((-1, 0) if query.strip() == str(i) else _rank(keys, wanted, words), i)
        for i, keys in enumerate(_keys(classes))
    ]
    return [i for rank, i in sorted((rank, i) for rank, i in ranked if rank is not None)]


def closest(classes: tuple[str, ...], name: str) -> list[int]:
    """What may have been meant by a `name` that no class has: what `search` finds, else the names
    that are spelt most like it. May be empty."""
    spellings = dict.fromkeys(key for keys in _keys(classes) for key in keys)
    return search(classes, name) or list(
        dict.fromkeys(
            label
            for match in get_close_matches(_normal(name), spellings, SUGGESTIONS)
            for label in find_labels(classes, match)
        )
    )


def _rank(keys: tuple[str, ...], query: str, words: tuple[str, ...]) -> tuple[int, int] | None:
    """How well the best of a class's keys matches, and its place; None where none does."""

    def rank(key: str) -> int | None:
        if key == query:
            return 0
        if key.startswith(query):
            return 1
        if all(f" {word}" in f" {key}" for word in words):
            return 2
        return 3 if all(word in key for word in words) else None

    ranks = [(found, place) for place, key in enumerate(keys) if (found := rank(key)) is not None]
    return min(ranks, default=None)


@lru_cache(maxsize=8)  # 3 ms for 1,000 classes; a lookup in them takes 0.05
def _keys(classes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(_class_keys, classes))


def _class_keys(string: str) -> tuple[str, ...]:
    """What a class is looked up by: its names in order, then the whole string."""
    return (*(_normal(name) for name in string.split(",") if name.strip()), _normal(string))


def _normal(text: str) -> str:
    # A class may be called "-".
    return re.sub(r"[\s_-]+", " ", text).strip().casefold() or text
