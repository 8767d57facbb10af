"""One definition: a field is a flag, an environment variable and a setting."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from rae.models.command_line import takes
from rae.server.serve_settings import ServeSettings
from rae.server.settings import EngineSettings, embedded_model

NAMES = [field.name for field in fields(ServeSettings)]


def parse(arguments: list[str], environment: dict[str, str]) -> tuple[ServeSettings | None, str]:
    seen: list[ServeSettings] = []
    app = typer.Typer()
    app.command()(takes(ServeSettings)(seen.append))
    result = CliRunner().invoke(app, arguments, env=environment)
    assert (result.exit_code == 2) == (not seen and "--help" not in arguments)
    return (seen[0] if seen else None), result.output


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_a_flag_with_help_and_a_variable(name: str) -> None:
    option = get_args(get_type_hints(ServeSettings, include_extras=True)[name])[1]
    assert option.envvar == f"RAE_{name.upper()}"
    assert option.help
    assert option.help.endswith(".")
    assert option.rich_help_panel
    assert f"--{name.replace('_', '-')}" in parse(["--help"], {"COLUMNS": "200"})[1]


def test_defaults_are_the_classes() -> None:
    assert parse([], {})[0] == ServeSettings()


def test_flags_beat_variables() -> None:
    variables = {"RAE_PORT": "81", "RAE_MAX_BATCH": "3", "RAE_DEVICE": "cpu"}
    variables |= {"RAE_CORS_ORIGINS": "https://a.example, https://b.example"}
    settings, _ = parse(["--port", "80", "--max-queue", "7"], variables)
    assert settings == ServeSettings(
        port=80,
        max_batch=3,
        max_queue=7,
        device="cpu",
        cors_origins="https://a.example, https://b.example",
    )
    assert settings
    assert settings.allowed_origins == ["https://a.example", "https://b.example"]


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["--port", "65536"], {}, ("--port", "RAE_PORT", "65535")),
        ([], {"RAE_PORT": "http"}, ("--port", "RAE_PORT", "integer")),
        (["--max-batch", "0"], {}, ("--max-batch", "RAE_MAX_BATCH", "1")),
        (["--device", "tpu"], {}, ("tpu", "auto", "cuda", "mps", "cpu")),
        ([], {"RAE_PRECISION": "fp64"}, ("fp64", "bf16")),
        (["--max-step", "5"], {}, ("--max-step", "--max-steps")),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(
    arguments: list[str], variables: dict[str, str], words: tuple[str, ...]
) -> None:
    settings, output = parse(arguments, {"COLUMNS": "200", **variables})
    assert settings is None
    for word in words:
        assert word in output


def test_settings_are_frozen_and_need_only_what_differs() -> None:
    assert EngineSettings(max_batch=2).max_queue == 150_000
    with pytest.raises(AttributeError):
        EngineSettings().max_batch = 3  # type: ignore[misc]


def test_the_embedded_model_is_the_default() -> None:
    assert ServeSettings().find_folder() == embedded_model()
    assert embedded_model().name == "digits"
