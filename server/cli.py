"""The `rae` command. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rae.server.settings import (
    EngineSettings,
    GenerateSettings,
    ReconstructSettings,
    ServeSettings,
    embedded_model,
    server_version,
    takes,
)

FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Serves class-conditional images, and trains the models that make them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def main() -> None:
    # Read when torch loads. Its threads spin for work 300,000 times before they sleep: beside a
    # process that does the same a step took 150 ms on 2 cores, and 9 with this; alone 5 and 6.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    app(prog_name="rae")


def fail(message: str, exit_code: int = 1) -> NoReturn:
    typer.secho(f"Error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(exit_code)


def print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"rae-server {server_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@app.command()
@takes(ServeSettings)
def serve(settings: ServeSettings) -> None:
    """Serve a checkpoint over HTTP: POST /generate, docs at /docs."""
    from rae.server.serve import prepare

    try:
        server = prepare(settings, typer.echo)
    except ValueError as error:
        fail(str(error))
    failure = server.serve_until_stopped()
    if failure:
        fail(failure)


@app.command()
@takes(GenerateSettings)
def generate(settings: GenerateSettings) -> None:
    """Generate images of CLASSES into files, without a server."""
    from rae.models.checkpoint import load_checkpoint
    from rae.server.engine import Engine
    from rae.server.errors import InvalidRequestError
    from rae.server.images import describe, encode
    from rae.server.limits import Limits
    from rae.server.metrics import Metrics
    from rae.server.schemas import read_request

    try:
        checkpoint = load_checkpoint(settings.folder)
        limits = Limits.of(checkpoint.config, max_steps=1000, max_images=1000)
        asked = [read_request(values, limits) for values in wanted(settings, limits.classes)]
        specs = [spec for request in asked for spec in request.specs(limits)]
        engine_settings = EngineSettings(
            device=settings.device,
            precision=settings.precision,
            max_batch=min(len(specs), EngineSettings.max_batch),
            max_queue=math.inf,
        )
        engine = Engine(checkpoint, engine_settings, Metrics())
        settings.out.mkdir(parents=True, exist_ok=True)
        # A request of its own for each: one of all would leave an eighth of the slots free.
        requests = [engine.submit([spec], "rae generate") for spec in specs]
        engine.start()
        try:
            images = [request.future.result().images[0] for request in requests]
        finally:
            engine.close()
        for spec, image in zip(specs, images, strict=True):
            description = describe(spec, checkpoint, engine.precision)
            path = settings.out / f"{file_stem(description)}.{settings.format}"
            path.write_bytes(encode(image, settings.format, description))
            typer.echo(f"{path} (seed {spec.seed})")
    except InvalidRequestError as error:
        fail(str(error), exit_code=2)
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))


def file_stem(description: Mapping[str, Any]) -> str:
    """Names may be shared by classes, so the id is in it."""
    name = re.sub(r"\W+", "-", str(description["class_name"])).strip("-")
    label = description["class_id"]
    kind = "unconditional" if label is None else f"{label}-{name}"
    return f"{kind}-seed{description['seed']}"


def wanted(settings: GenerateSettings, names: Sequence[str]) -> list[dict[str, object]]:
    """One request for each class; a class is a name or, where no name is like it, an id."""
    common = {
        "cfg": settings.cfg,
        "steps": settings.steps,
        "seed": settings.seed,
        "n": settings.n,
        "guidance_method": settings.guidance_method,
        "guidance_interval": settings.guidance_interval,
    }
    classes: list[dict[str, object]] = [
        {"class_id": int(text)}
        if text not in names and re.fullmatch(r"-?\d{1,9}", text)
        else {"class_name": text}
        for text in settings.classes or ()
    ]
    return [common | chosen for chosen in classes or [{}]]


@app.command()
def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder.", show_default="the embedded digits")
    ] = None,
) -> None:
    """Show what a checkpoint folder holds, and check its files against their sha256."""
    from rich.console import Console

    from rae.server.inspection import report

    try:
        problems = report(checkpoint or embedded_model(), Console())
    except ValueError as error:
        fail(str(error))
    if problems:
        fail("; ".join(problems))


@app.command()
def verify(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder.", show_default="the embedded digits")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the published implementation's numbers for this very checkpoint, as "
            "benchmarks/record_reference.py writes them: dit_dh.io.safetensors, "
            "decoder.io.safetensors. No other kind of folder is read."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture to reconstruct.", show_default="a drawn one"),
    ] = None,
) -> None:
    """Check a checkpoint's files, tensors, values, outputs and reconstruction; exit 1 if wrong."""
    from rich.console import Console
    from rich.text import Text

    from rae.models.verify import verify as verify_folder

    words = {True: ("pass", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}
    console = Console(soft_wrap=True, highlight=False)
    failures = 0
    for check in verify_folder(checkpoint or embedded_model(), reference=reference, image=image):
        failures += check.passed is False
        console.print(Text.assemble(words[check.passed], f"  {check.name}: {check.detail}"))
    if failures:
        fail(f"{failures} {'check' if failures == 1 else 'checks'} failed")


@app.command()
@takes(ReconstructSettings)
def reconstruct(settings: ReconstructSettings) -> None:
    """Write each IMAGE beside what the autoencoder makes of it, and print the PSNR."""
    from rae.models.checkpoint import load_autoencoder
    from rae.models.reconstruct import psnr_db, read_picture, side_by_side
    from rae.models.reconstruct import reconstruct as reconstruct_picture

    try:
        files = settings.files()
        config, rae = load_autoencoder(settings.folder, settings.encoder)
        for path, file in files.items():
            picture = read_picture(path, config.decoder.image_size)
            rebuilt = reconstruct_picture(rae, picture)
            file.parent.mkdir(parents=True, exist_ok=True)
            side_by_side(picture, rebuilt).save(file)
            typer.echo(f"{file} (PSNR {psnr_db(rebuilt, picture):.2f} dB)")
    except (ImportError, OSError, ValueError) as error:
        fail(str(error))


@app.command(context_settings=FORWARDED, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train a model: `rae train digits --out DIR`."""
    forward("train", context.args)


@app.command("eval", context_settings=FORWARDED, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Measure a model: `rae eval digits`."""
    forward("eval", context.args)


def forward(command: str, arguments: list[str]) -> NoReturn:
    try:
        from rae.training.cli import eval_app, train_app
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing; pip install 'rae-server[train]'")
    commands = {"train": train_app, "eval": eval_app}
    sys.exit(commands[command](arguments, prog_name=f"rae {command}"))
