"""`--set key=value`: every type, what is refused and how it is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rae.training.overrides import differences, override, to_assignments
from rae.training.planning.plan_cli import PRESETS
from rae.training.stage2.presets import DIT_PRESETS

XL = DIT_PRESETS["DiTDH-XL-256"]


@pytest.mark.parametrize(
    ("assignment", "changes"),
    [
        ("lr=1e-3", {"lr": 1e-3}),
        ("batch_size=64", {"batch_size": 64}),
        ("betas=0.5,0.9", {"betas": (0.5, 0.9)}),
        ("horizontal_flip=false", {"horizontal_flip": False}),
        ("clip_norm=none", {"clip_norm": None}),
        ("shift=3", {"shift": 3.0}),
        ("lr_shape=cosine", {"lr_shape": "cosine"}),
        ("milestone_epochs=14,20", {"milestone_epochs": (14.0, 20.0)}),
        ("milestone_epochs=", {"milestone_epochs": ()}),
        ("model.depth=3", {"model": replace(XL.model, depth=3)}),
    ],
)
def test_values_get_their_fields_type(assignment: str, changes: dict[str, Any]) -> None:
    assert override(XL, [assignment]) == replace(XL, **changes)


def test_what_only_fits_together_is_set_together() -> None:
    changes = ["model.hidden_size=16", "model.num_heads=2", "epochs=1", "constant_epochs=0"]
    small = override(XL, changes)
    assert (small.model.hidden_size, small.model.num_heads, small.epochs) == (16, 2, 1)


def test_the_last_of_several_counts() -> None:
    assert override(XL, ["seed=1", "lr=1e-3", "seed=2"]) == replace(XL, seed=2, lr=1e-3)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("seed", "--set seed: KEY=VALUE is wanted"),
        (
            "learning_rate=1",
            "the recipe has no 'learning_rate'; known: batch_size, epochs",
        ),
        ("bach_size=1", "the recipe has no 'bach_size'; did you mean batch_size"),
        ("model.dept=1", "--set model.dept=1: model has no 'dept'; did you mean depth"),
        ("lr.x=1", "--set lr.x=1: lr has no parts"),
        ("model=XL", "--set model=XL: set one of model.latent_channels, model"),
        ("lr=fast", r"--set lr=fast: a number \(float\) is wanted"),
        ("batch_size=1.5", r"batch_size=1.5: a number \(int\) is wanted"),
        ("batch_size=0", "--set batch_size: batch_size 0 is not a positive integer"),
        ("lr=nan", "lr nan is not a positive number"),
        ("horizontal_flip=yes", "horizontal_flip=yes: true or false is wanted"),
        ("lr_shape=step", "lr_shape=step: allowed are linear, cosine"),
        ("betas=0.9", "betas=0.9: 2 values with commas between are wanted"),
        ("constant_epochs=801", "--set constant_epochs: .* more than epochs 800"),
        ("model.hidden_size=7", "--set model.hidden_size: hidden_size 7 must be num_heads"),
        ("may_be_zero=x", "the recipe has no 'may_be_zero'"),
    ],
)
def test_what_is_wrong_is_named(assignment: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        override(XL, [assignment])


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_as_assignments_is_the_recipe(name: str) -> None:
    recipe = PRESETS[name]
    other = replace(recipe, lr=1.0, seed=9, clip_norm=3.0, betas=(0.1, 0.2))
    assert override(other, list(to_assignments(recipe))) == recipe


def test_assignments_are_text_of_every_type() -> None:
    recipe = replace(XL, milestone_epochs=(14.0, 20.5), clip_norm=None)
    lines = set(to_assignments(recipe))
    expected = {"milestone_epochs=14.0,20.5", "clip_norm=none", "horizontal_flip=true"}
    assert expected | {"lr_shape=linear", "model.depth=28", "final_lr=2e-05"} <= lines


def test_differences_name_nested_keys() -> None:
    ours, theirs = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(ours, theirs) == ["a.c: 2, not 4", "d: 3, not None", "e: None, not 5"]
