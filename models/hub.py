"""Published models by name from the hub: downloaded once, converted once, then a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rae.models.cache import HUB_NAME, model_folder
from rae.models.checkpoint_config import CheckpointError
from rae.models.convert import convert
from rae.models.locks import held
from rae.models.published import HUB_REPOSITORY, PRESETS, Autoencoder, Published


def preset(name: str) -> Published:
    """Raises CheckpointError that lists the known names."""
    if name not in PRESETS:
        raise CheckpointError(f"preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def below(published: Published, root: Path, repository: str | None = None) -> Published:
    """The preset's files under `root`: the hub repository's folder, or one that holds it as
    `models`, as the authors' README has it."""
    if not (root / published.files[0]).exists() and (root / "models" / published.files[0]).exists():
        root = root / "models"
    autoencoder = published.autoencoder
    assert isinstance(autoencoder, Autoencoder) and autoencoder.statistics_file
    return replace(
        published,
        source=f"hub {repository}" if repository else f"files named as those of {HUB_REPOSITORY}",
        license=f"see https://huggingface.co/{repository or HUB_REPOSITORY}",
        autoencoder=replace(
            autoencoder,
            decoder_file=root / autoencoder.decoder_file,
            statistics_file=root / autoencoder.statistics_file,
        ),
        dit_dh=published.dit_dh and published.dit_dh._replace(file=root / published.dit_dh.file),
        guide=published.guide and published.guide._replace(file=root / published.guide.file),
    )


def download(name: str, repository: str = HUB_REPOSITORY) -> Path:
    """The preset's files in the hub's cache, resumed where a download was cut off; the folder
    that holds them. Raises CheckpointError that lists the files where it cannot be done."""
    files = [file.as_posix() for file in preset(name).files]
    by_hand = (
        f"place these files of {repository} under a folder DIR and run `rae convert --preset "
        f"{name} --root DIR --out FOLDER`: {', '.join(files)}"
    )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"downloads need huggingface_hub: pip install 'rae-server[convert]'; or {by_hand}"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # errors of its HTTP client pass through; which, its release says
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{repository} cannot be downloaded ({reason}); {by_hand}") from error


def local_folder(model: str, notify: Callable[[str], None]) -> Path:
    """The checkpoint folder of `--model`: a path, or REPOSITORY:PRESET, which is downloaded and
    converted into the user's cache the first time. Raises CheckpointError."""
    match = HUB_NAME.fullmatch(model)
    if match is None and not Path(model).exists():
        raise CheckpointError(
            f"{model} is not a checkpoint folder: it does not exist. A published model is "
            f"{HUB_REPOSITORY}:PRESET, with one of {', '.join(PRESETS)}"
        )
    if match is None or Path(model).exists():
        return Path(model)
    published = preset(match["preset"])
    repository = match["repository"]
    folder = model_folder(repository, match["preset"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a") as lock, held(lock, wait=True):
        if not (folder / "config.json").exists():
            root = download(match["preset"], repository)
            notify(f"Converting into {folder}")
            convert(below(published, root, repository), folder, notify=notify)
    return folder
