"""What a checkpoint cannot do is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rae.models.checkpoint_config import SamplerDefaults, read_config
from rae.server.errors import InvalidRequestError
from rae.server.limits import Limits, shown
from rae.server.schemas import GenerateRequest, LimitsInfo, read_request, request_body
from rae.server.serve_settings import ServeSettings

EVERYTHING = Limits(
    classes=("cat", "crane", "dog", "crane"),
    defaults=SamplerDefaults(steps=50, cfg=1.5),
    has_null_label=True,
    methods=("cfg", "autoguidance"),
    max_steps=100,
    max_images=4,
)
NO_NULL = replace(EVERYTHING, has_null_label=False, methods=("autoguidance",))
NO_GUIDE = replace(EVERYTHING, methods=("cfg",))
NOTHING = replace(NO_NULL, methods=())


@pytest.mark.parametrize(
    ("limits", "values", "message"),
    [
        (
            EVERYTHING,
            {"class_name": "crane"},
            'class_name is "crane"; allowed: give class_id: 1 and 3 have this name',
        ),
        (
            EVERYTHING,
            {"class_id": 2, "class_name": "crane"},
            'class_id is 2 beside class_name "crane"; allowed: 1 or 3, or none',
        ),
        (NO_NULL, {"cfg": 1}, "class_id is null; allowed: an integer from 0 to 3"),
        (
            NO_NULL,
            {"class_id": 1},
            'guidance_method is "cfg"; allowed: autoguidance with this checkpoint',
        ),
        (
            NO_GUIDE,
            {"class_id": 1, "guidance_method": "autoguidance"},
            'guidance_method is "autoguidance"; allowed: cfg with this checkpoint',
        ),
        (
            NOTHING,
            {"class_id": 1, "cfg": 2},
            'guidance_method is "cfg"; allowed: none with this checkpoint',
        ),
    ],
)
def test_refused(limits: Limits, values: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_request(values, limits)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("limits", "values", "label"),
    [
        (EVERYTHING, {"class_id": 3, "class_name": "crane"}, 3),
        (EVERYTHING, {"class_name": "dog"}, 2),
        (EVERYTHING, {}, 4),
        (NO_NULL, {"class_id": 1, "guidance_method": "autoguidance"}, 1),
        (NOTHING, {"class_id": 1, "cfg": 1}, 1),
    ],
)
def test_accepted(limits: Limits, values: dict, label: int) -> None:
    (spec,) = read_request(values, limits).specs(limits)
    assert spec.class_label == label


def test_random_seeds_leave_room_for_all_images() -> None:
    for _ in range(100):
        specs = read_request({"n": 4}, EVERYTHING).specs(EVERYTHING)
        seeds = [spec.seed for spec in specs]
        assert seeds == list(range(seeds[0], seeds[0] + 4))
        assert 0 <= seeds[0] <= 2**53 - 4


def test_the_documentation_says_what_is_allowed() -> None:
    content = request_body(NOTHING)["content"]["application/json"]
    properties = content["schema"]["properties"]
    assert properties["steps"]["anyOf"][0] == {"type": "integer", "minimum": 2, "maximum": 100}
    assert properties["guidance_method"]["description"].endswith(
        "Allowed: none with this checkpoint."
    )
    assert content["schema"]["additionalProperties"] is False
    assert len(content["examples"]) == 3


def test_shown_is_short_and_printable() -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "a deeply nested value"
    assert shown("é\ud800") == r'"é\ud800"'
    assert len(shown(["x" * 1000])) == 81


def test_a_default_above_the_limit_is_refused_at_the_start(tiny_checkpoint: Path) -> None:
    config, _ = read_config(tiny_checkpoint)
    assert Limits.of(config, max_steps=10, max_images=1).max_steps == 10
    with pytest.raises(ValueError, match="default of 10 steps is above the limit of 9"):
        Limits.of(config, max_steps=9, max_images=1)


def test_limits_are_told(client: TestClient) -> None:
    assert client.get("/limits").json() == {
        "ranges": {
            "class_id": {"minimum": 0, "maximum": 3},
            "cfg": {"minimum": 1, "maximum": 100},
            "steps": {"minimum": 2, "maximum": 1000},
            "n": {"minimum": 1, "maximum": 64},
            "seed": {"minimum": 0, "maximum": 2**53 - 1},
            "deadline_ms": {"minimum": 1, "maximum": 86_400_000},
            "guidance_interval": {"minimum": 0, "maximum": 1},
        },
        "choices": {
            "guidance_method": ["cfg", "autoguidance"],
            "format": ["png", "jpeg", "webp"],
            "solver": ["euler"],
            "priority": ["low", "normal", "high"],
        },
        "unconditional": True,
        "max_body_bytes": 65_536,
        "max_queue_evaluations": 150_000,
        "rate_limit": None,
        "needs_api_key": False,
    }


def test_told_limits_are_those_of_the_settings_and_of_the_checkpoint() -> None:
    settings = ServeSettings(max_body_bytes=99, max_queue=7, rate_limit=2.5, rate_burst=4)
    told = LimitsInfo.of(NO_NULL, settings, needs_api_key=True).model_dump()
    assert told["ranges"]["steps"] == {"minimum": 2, "maximum": NO_NULL.max_steps}
    assert told["choices"]["guidance_method"] == ["autoguidance"]
    assert {*told["ranges"], *told["choices"], "class_name"} == set(GenerateRequest.model_fields)
    del told["ranges"], told["choices"]
    assert told == {
        "unconditional": False,
        "max_body_bytes": 99,
        "max_queue_evaluations": 7,
        "rate_limit": {"evaluations_per_s": 2.5, "burst_evaluations": 10},
        "needs_api_key": True,
    }


@pytest.mark.parametrize("end", ["minimum", "maximum"])
def test_told_ends_are_accepted_and_beyond_is_not(end: str) -> None:
    told = LimitsInfo.of(EVERYTHING, ServeSettings(), needs_api_key=False).model_dump()
    beyond = -1 if end == "minimum" else 1
    for name, bounds in told["ranges"].items():
        value, wrong = bounds[end], bounds[end] + beyond
        if name == "guidance_interval":
            value, wrong = [value, value], [wrong, wrong]
        read_request({name: value}, EVERYTHING)
        with pytest.raises(InvalidRequestError, match=f"^{name} is "):
            read_request({name: wrong}, EVERYTHING)
