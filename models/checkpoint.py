"""The checkpoint folder: what training writes and the server reads.

`config.json` names everything; weights are safetensors, loaded strictly onto meta-device models.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rae.models.config import DecoderConfig, DiTDHConfig, GuidanceMethod, from_dict, is_number
from rae.models.dit_dh import DiTDH
from rae.models.encoder import EncoderConfig, load_encoder
from rae.models.rae import RAE
from rae.models.sampling import Guidance

FORMAT_VERSION = 1
DIT_DH_FILE = "dit_dh.safetensors"
DECODER_FILE = "decoder.safetensors"
GUIDE_FILE = "guide.safetensors"
MAX_CFG = 100
STATISTICS = ("latents_mean", "latents_var", "eps")

OBJECT, OPTIONAL, ARRAY, STRING = (dict,), (dict, NoneType), (list,), (str,)
JSON_NAMES = {OBJECT: "an object", OPTIONAL: "an object or null", ARRAY: "a list", STRING: "text"}
JSON_TYPES = {
    **dict.fromkeys(("dit_dh", "decoder", "defaults", "sha256", "notes"), OBJECT),
    **dict.fromkeys(("guide", "encoder"), OPTIONAL),
    **dict.fromkeys(("classes", "image_mean", "image_std"), ARRAY),
    **dict.fromkeys(("name", "source", "license"), STRING),
}


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, and why."""


@dataclass(frozen=True, kw_only=True)
class SamplerDefaults:
    """What a request gets that does not say. `cfg` and the interval as on the wire."""

    steps: int = 50
    cfg: float = 1.0
    guidance_method: GuidanceMethod = "cfg"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 2:
            raise ValueError(f"steps {self.steps!r}: a grid has at least 2 points")
        if not is_number(self.cfg) or not 1 <= self.cfg <= MAX_CFG:
            raise ValueError(f"cfg {self.cfg!r} is not in [1, {MAX_CFG}]")
        Guidance(self.cfg, self.guidance_interval, self.guidance_method)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The contents of config.json but for the format version."""

    name: str
    dit_dh: DiTDHConfig
    decoder: DecoderConfig
    guide: DiTDHConfig | None = None
    encoder: EncoderConfig | None = None
    classes: tuple[str, ...]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    shift: float
    defaults: SamplerDefaults = field(default_factory=SamplerDefaults)
    source: str = ""
    license: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes {self.classes[:5]!r} are not all names")
        if len(self.classes) != self.dit_dh.num_classes:
            raise ValueError(
                f"{len(self.classes)} class names for num_classes {self.dit_dh.num_classes}"
            )
        if len(self.image_mean) != 3 or not all(map(is_number, self.image_mean)):
            raise ValueError(f"image_mean {self.image_mean} is not 3 numbers")
        if len(self.image_std) != 3 or not all(is_number(x) and x > 0 for x in self.image_std):
            raise ValueError(f"image_std {self.image_std} is not 3 positive numbers")
        if not is_number(self.shift) or self.shift <= 0:
            raise ValueError(f"shift {self.shift!r} is not a positive number")
        if self.defaults.cfg > 1 and self.defaults.guidance_method not in self.guidance_methods:
            raise ValueError(
                f"default guidance_method {self.defaults.guidance_method!r} needs what this "
                f"checkpoint lacks; it has {', '.join(self.guidance_methods) or 'none'}"
            )
        decoder_shape = (self.decoder.latent_channels, self.decoder.grid, self.decoder.grid)
        if self.dit_dh.latent_shape != decoder_shape:
            raise ValueError(
                f"latents: {self.dit_dh.latent_shape} of dit_dh, {decoder_shape} of decoder"
            )
        if self.guide is not None and (
            self.guide.latent_shape != self.dit_dh.latent_shape
            or self.guide.num_classes != self.dit_dh.num_classes
            or self.guide.has_null_label < self.dit_dh.has_null_label
        ):
            raise ValueError("guide and dit_dh differ in latent shape, classes or null label")

    @property
    def guidance_methods(self) -> tuple[GuidanceMethod, ...]:
        """What this checkpoint can be guided by."""
        cfg: tuple[GuidanceMethod, ...] = ("cfg",) if self.dit_dh.has_null_label else ()
        return (*cfg, "autoguidance") if self.guide else cfg

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError that names an unknown key, a missing one, or a newer format."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("config.json does not hold an object")
        version = values.pop("format_version", None)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version {version!r}; this rae-server reads 1 to {FORMAT_VERSION}"
            )
        for key, kinds in JSON_TYPES.items():
            if key in values and not isinstance(values[key], kinds):
                raise ValueError(f"{key} {values[key]!r} is not {JSON_NAMES[kinds]}")
        parts = {
            "dit_dh": DiTDHConfig,
            "guide": DiTDHConfig,
            "decoder": DecoderConfig,
            "encoder": EncoderConfig,
            "defaults": SamplerDefaults,
        }
        for key, part in parts.items():
            if values.get(key) is not None:
                values[key] = from_dict(part, values[key])
        for key in ("classes", "image_mean", "image_std"):
            if key in values:
                values[key] = tuple(values[key])
        return from_dict(cls, values)

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, on the CPU. `sha256` is config.json's, which holds the files' own."""

    config: CheckpointConfig
    sha256: str
    dit_dh: DiTDH
    rae: RAE
    guide: DiTDH | None


def read_config(folder: Path) -> tuple[CheckpointConfig, str]:
    """The configuration of a checkpoint folder and its sha256. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint folder: no readable config.json"
        ) from error
    try:
        return CheckpointConfig.from_json(data.decode()), hashlib.sha256(data).hexdigest()
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_checkpoint(folder: Path, *, with_encoder: bool = False) -> Checkpoint:
    """Load a checkpoint folder onto the CPU, memory-mapped, in eval mode.

    Raises CheckpointError that lists what is missing, unexpected, misshapen or unreadable, or
    names a file that is not the one whose sha256 is recorded.
    """
    config, sha256 = read_config(folder)
    with torch.device("meta"):
        dit_dh = DiTDH(config.dit_dh)
        guide = DiTDH(config.guide) if config.guide else None
    load_strictly(dit_dh, read_tensors(folder / DIT_DH_FILE), folder / DIT_DH_FILE)
    if guide is not None:
        load_strictly(guide, read_tensors(folder / GUIDE_FILE), folder / GUIDE_FILE)
    rae = _load_rae(config, folder)
    _check_sha256(config, folder, with_encoder=with_encoder)
    if with_encoder:
        if config.encoder is None:
            raise CheckpointError(f"{folder} holds no encoder")
        try:
            rae.encoder = load_encoder(config.encoder, folder / "encoder")
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder / 'encoder'}: {error}") from error
    return Checkpoint(config, sha256, dit_dh, rae, guide)


def save_checkpoint(
    folder: Path, config: CheckpointConfig, dit_dh: DiTDH, rae: RAE, guide: DiTDH | None = None
) -> CheckpointConfig:
    """Write a checkpoint folder; returns the configuration with the files' sha256.

    `encoder/` is a transformers folder that its owner has put there where the configuration has
    an encoder. config.json comes last: without it a folder is no checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save(dit_dh.state_dict(), folder / DIT_DH_FILE)
    if guide is not None:
        _save(guide.state_dict(), folder / GUIDE_FILE)
    statistics = {key: getattr(rae, key) for key in STATISTICS if getattr(rae, key) is not None}
    _save({**rae.decoder.state_dict(), **statistics}, folder / DECODER_FILE)
    names = [DIT_DH_FILE, DECODER_FILE] + [GUIDE_FILE] * (guide is not None)
    if config.encoder is not None:
        names += sorted(f"encoder/{path.name}" for path in folder.glob("encoder/*"))
    for name in names:
        (folder / name).chmod(0o644)  # safetensors leaves a file readable by its owner alone
    hashes = {name: file_sha256(folder / name) for name in names}
    config = replace(config, sha256=hashes)
    (folder / "config.json").write_text(config.to_json())
    return config


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_problem(path: Path, recorded: str) -> str | None:
    """Why a file is not the one whose sha256 is recorded, or None."""
    if not path.is_file():
        return f"{path} is missing"
    actual = file_sha256(path)
    return (
        None if actual == recorded else f"{path} has sha256 {actual}, config.json says {recorded}"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, memory-mapped. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is truncated or not safetensors: {error}") from error


def _check_sha256(config: CheckpointConfig, folder: Path, *, with_encoder: bool) -> None:
    """An image names its checkpoint by these: other weights may not pass for it."""
    for name, recorded in config.sha256.items():
        if name.startswith("encoder/") and not with_encoder:
            continue
        problem = file_problem(folder / name, recorded)
        if problem:
            raise CheckpointError(problem)


def _load_rae(config: CheckpointConfig, folder: Path) -> RAE:
    path = folder / DECODER_FILE
    tensors = read_tensors(path)
    with torch.device("meta"):
        rae = RAE(
            config.decoder,
            image_mean=config.image_mean,
            image_std=config.image_std,
            has_mean="latents_mean" in tensors,
        )
    statistics = {key: tensors.pop(key) for key in STATISTICS if key in tensors}
    missing = {"latents_var", "eps"} - statistics.keys()
    if missing:
        raise CheckpointError(f"{path}: missing {', '.join(sorted(missing))}")
    for key, value in statistics.items():
        shape = getattr(rae, key).shape
        try:
            # Statistics may be per channel: whatever broadcasts to the latents' shape.
            value = value.float().broadcast_to(shape)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path}: {key} {tuple(value.shape)} for {tuple(shape)}"
            ) from error
        setattr(rae, key, value)
    load_strictly(rae.decoder, tensors, path)
    return rae.eval().requires_grad_(False)


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Assign `tensors` to a (meta-device) model. Raises CheckpointError that lists every
    missing, unexpected and misshapen tensor; `path` is for the message."""
    expected = model.state_dict()
    problems = [
        f"missing {key} {list(expected[key].shape)}" for key in expected if key not in tensors
    ]
    problems += [
        f"unexpected {key} {list(tensors[key].shape)}" for key in tensors if key not in expected
    ]
    problems += [
        f"{key} is {list(value.shape)}, expected {list(expected[key].shape)}"
        for key, value in tensors.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems += [
        f"{key} is {value.dtype}, expected a floating type"
        for key, value in tensors.items()
        if key in expected and not value.is_floating_point()
    ]
    if problems:
        raise CheckpointError(f"{path}: " + "; ".join(problems))
    model.load_state_dict({key: value.float() for key, value in tensors.items()}, assign=True)
    model.eval().requires_grad_(False)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    # Not in place: the tensors may be mapped from the very file that is replaced.
    written = path.with_suffix(".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, written)
    written.replace(path)
