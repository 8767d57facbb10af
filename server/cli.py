"""The `rae` command. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rae.models import labels
from rae.models.command_line import takes
from rae.server.checkpoint_cli import checkpoints
from rae.server.command_settings import ClassesSettings, GenerateSettings, SampleSettings
from rae.server.serve_settings import ServeSettings
from rae.server.settings import EngineSettings, server_version
from rae.server.stopping import Stopping
from rae.server.terminal import fail

FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Serves class-conditional images, and trains the models that make them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.add_typer(checkpoints)


def main() -> None:
    if os.getpid() == 1:  # of a container: the kernel drops signals that it has no handler for
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Read when torch loads. Its threads spin for work 300,000 times before they sleep: beside a
    # process that does the same a step took 150 ms on 2 cores, and 9 with this; alone 5 and 6.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # oneDNN keeps 1,024 kernels, of every number of rows that ever was in a step: some 150 MB more,
    # and with the digits not one image a second (four runs in turns).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    app(prog_name="rae")


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
    stopping = Stopping()
    from rae.server.logs import announcer
    from rae.server.serve import prepare

    try:
        server = prepare(settings, announcer(settings.log_format))
    except (ValueError, OSError) as error:
        fail(str(error))
    failure = server.serve_until_stopped(stopping)
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
        checkpoint = load_checkpoint(settings.find_folder(), keep_bf16=True)
        limits = Limits.of(checkpoint.config, max_steps=1000, max_images=1000)
        asked = [read_request(values, limits) for values in wanted(settings, limits.classes)]
        specs = [spec for request in asked for spec in request.specs(limits)]
        engine_settings = EngineSettings(
            device=settings.device,
            precision=settings.precision,
            kernels=settings.kernels,
            attention=settings.attention,
            compile=settings.compile,
            max_batch=min(2 * len(specs), EngineSettings.max_batch),
            max_queue=math.inf,
        )
        engine = Engine(checkpoint, engine_settings, Metrics())
        settings.out.mkdir(parents=True, exist_ok=True)
        request = engine.submit(specs, "rae generate")
        engine.start()
        try:
            images = request.future.result().images
        finally:
            engine.close()
        for spec, image in zip(specs, images, strict=True):
            description = describe(spec, checkpoint.config, checkpoint.sha256, engine.precision)
            path = settings.out / f"{file_stem(description)}.{settings.format}"
            path.write_bytes(encode(image, settings.format, description))
            typer.echo(f"{path} (seed {spec.seed})")
    except InvalidRequestError as error:
        fail(str(error), exit_code=2)
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))


def file_stem(description: Mapping[str, Any]) -> str:
    """Names may be shared by classes, so the id is in it."""
    name = re.sub(r"\W+", "-", labels.first_name(str(description["class_name"]))).strip("-")
    label = description["class_id"]
    kind = "unconditional" if label is None else f"{label}-{name}"
    return f"{kind}-seed{description['seed']}"


def wanted(settings: GenerateSettings, names: tuple[str, ...]) -> list[dict[str, object]]:
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
        if not labels.find_labels(names, text) and re.fullmatch(r"-?\d{1,9}", text)
        else {"class_name": text}
        for text in settings.classes or ()
    ]
    return [common | chosen for chosen in classes or [{}]]


@app.command()
@takes(ClassesSettings)
def classes(settings: ClassesSettings) -> None:
    """List the classes that match QUERY, the best match first: id and names."""
    try:
        is_imagenet = settings.imagenet
        names = labels.imagenet_classes() if is_imagenet else classes_of(settings.find_folder())
    except (ValueError, OSError) as error:
        fail(str(error))
    query = " ".join(settings.query or ())
    found = labels.search(names, query)
    if not found:
        similar = labels.shortlist(names, labels.closest(names, query))
        fail(f'no class matches "{query}"' + (f"; closest are {similar}" if similar else ""))
    typer.echo("\n".join(f"{i}  {names[i]}" for i in found))


def classes_of(folder: Path) -> tuple[str, ...]:
    from rae.models.checkpoint_config import read_config

    return read_config(folder)[0].classes


@app.command()
@takes(SampleSettings)
def sample(settings: SampleSettings) -> None:
    """Sample the images of an FID into one .npz; stopped or killed, the same command goes on."""
    from rae.server.errors import InvalidRequestError
    from rae.server.sample import run

    try:
        exit_code = run(settings, typer.echo)
    except InvalidRequestError as error:
        fail(str(error), exit_code=2)
    except (ValueError, OSError, RuntimeError) as error:
        fail(str(error))
    raise typer.Exit(exit_code)


@app.command()
def tune(
    out: Annotated[
        Path | None, typer.Option(help="The file; else the GPU's, as rae reads.")
    ] = None,
) -> None:
    """Measure the kernels on this GPU, and write the table that picks them."""
    from rae.kernels.tune import tune_gpu

    try:
        typer.echo(tune_gpu(out, typer.echo))
    except (ValueError, OSError, RuntimeError) as error:
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
