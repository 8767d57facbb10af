"""config.json of a checkpoint folder: what it says, and what it may say."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Self

from rae.models.config import (
    DecoderConfig,
    DiTDHConfig,
    EncoderConfig,
    GuidanceMethod,
    from_dict,
    is_number,
)
from rae.models.guidance import Guidance

FORMAT_VERSION = 2  # 2: fingerprints, folders without a DiT^DH, an encoder's name
MAX_CFG = 100

FILE_NAME = re.compile(r"(encoder/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")

OBJECT, OPTIONAL, ARRAY, STRING = (dict,), (dict, NoneType), (list,), (str,)
JSON_NAMES = {OBJECT: "an object", OPTIONAL: "an object or null", ARRAY: "a list", STRING: "text"}
JSON_TYPES = {
    **dict.fromkeys(("dit_dh", "decoder", "defaults", "sha256", "fingerprints", "notes"), OBJECT),
    **dict.fromkeys(("guide", "encoder"), OPTIONAL),
    **dict.fromkeys(("classes", "image_mean", "image_std"), ARRAY),
    **dict.fromkeys(("name", "source", "license"), STRING),
}


class CheckpointError(ValueError):
    """A checkpoint folder, or a file for one, that cannot be used, and why."""


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
class AutoencoderConfig:
    """What config.json says of the RAE; all of it for a folder that holds no DiT^DH.

    `encoder` is the encoder that the RAE was trained with; its weights need not be there.
    `sha256` are the files' own; `fingerprints` are outputs for fixed inputs (models/verify.py).
    """

    name: str
    decoder: DecoderConfig
    encoder: EncoderConfig | None = None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    source: str = ""
    license: str = ""
    sha256: Mapping[str, str] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sha256:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"sha256 of {name!r}, which is no file of a checkpoint folder")
        if len(self.image_mean) != 3 or not all(map(is_number, self.image_mean)):
            raise ValueError(f"image_mean {self.image_mean} is not 3 numbers")
        if len(self.image_std) != 3 or not all(is_number(x) and x > 0 for x in self.image_std):
            raise ValueError(f"image_std {self.image_std} is not 3 positive numbers")

    @property
    def has_encoder(self) -> bool:
        """Whether the encoder's weights are in the folder."""
        return any(name.startswith("encoder/") for name in self.sha256)

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> Self:
        """From JSON's types. Raises ValueError that names an unknown key or a missing one."""
        values = dict(values)
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


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(AutoencoderConfig):
    """The contents of config.json but for the format version."""

    dit_dh: DiTDHConfig
    guide: DiTDHConfig | None = None
    classes: tuple[str, ...]
    shift: float
    defaults: SamplerDefaults = field(default_factory=SamplerDefaults)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes {self.classes[:5]!r} are not all names")
        if len(self.classes) != self.dit_dh.num_classes:
            raise ValueError(
                f"{len(self.classes)} class names for num_classes {self.dit_dh.num_classes}"
            )
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


def parse_config(text: str) -> AutoencoderConfig:
    """A CheckpointConfig, or an AutoencoderConfig where config.json has nothing of a DiT^DH.

    Raises ValueError that names what is wrong, a newer format among others.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("config.json does not hold an object")
    if "format_version" not in values:
        raise ValueError("not a rae checkpoint's: it has no format_version")
    version = values.pop("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"format_version {version!r}; this rae-server reads 1 to {FORMAT_VERSION}")
    has_dit_dh = values.keys() & {"dit_dh", "guide", "classes", "shift", "defaults"}
    return (CheckpointConfig if has_dit_dh else AutoencoderConfig).of_values(values)


def read_config(folder: Path) -> tuple[CheckpointConfig, str]:
    """The configuration of a checkpoint folder and its sha256. Raises CheckpointError."""
    config, sha256 = read_any_config(folder)
    if not isinstance(config, CheckpointConfig):
        raise CheckpointError(
            f"{folder} holds an autoencoder without a DiT^DH: `rae reconstruct` can use it, "
            "nothing can be generated"
        )
    return config, sha256


def read_any_config(folder: Path) -> tuple[AutoencoderConfig, str]:
    """As `read_config`, also of a folder that holds no DiT^DH."""
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint folder: no readable config.json"
        ) from error
    try:
        return parse_config(data.decode()), hashlib.sha256(data).hexdigest()
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
