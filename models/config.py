"""Configurations of DiT^DH, DiT and the RAE decoder, and the table of the published sizes.

Sources: arXiv 2510.11690; github bytetriper/RAE, `src/stage2/models/DDT.py` and `src/stage1`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, Self, TypeVar, get_args, get_type_hints

GuidanceMethod = Literal["cfg", "autoguidance"]
Solver = Literal["euler", "heun2", "midpoint"]
EncoderKind = Literal["dinov2", "siglip2", "mae"]

T = TypeVar("T")

MAX_SIZE, MAX_DEPTH = 2**20, 1000
PAIRS = ("hidden_size", "depth", "num_heads")  # of backbone and head in the authors' arguments


@dataclass(frozen=True, kw_only=True)
class DiTDHConfig:
    """A DiT backbone that conditions a wide, shallow head (arXiv 2510.11690, section 5).

    `mlp_ratio` is the width of a GELU MLP over the block's; a SwiGLU has 2/3 of it.
    `class_dropout_prob` only matters in training, but 0 means that no null label exists.
    """

    latent_channels: int = 768
    latent_size: int = 16
    hidden_size: int
    depth: int
    num_heads: int
    head_hidden_size: int = 2048
    head_depth: int = 2
    head_num_heads: int = 16
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_rmsnorm: bool = True
    use_swiglu: bool = True
    use_pos_embed: bool = True

    def __post_init__(self) -> None:
        require_types(self, may_be_zero=("class_dropout_prob",))
        for prefix in ("", "head_"):
            width, heads = (
                getattr(self, f"{prefix}hidden_size"),
                getattr(self, f"{prefix}num_heads"),
            )
            if width % heads or (width // heads) % 4:
                raise ValueError(
                    f"{prefix}hidden_size {width} must be {prefix}num_heads {heads} times "
                    "a multiple of 4 (rotary pairs in two halves)"
                )
        if self.class_dropout_prob >= 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob} is not in [0, 1)")

    @property
    def num_tokens(self) -> int:
        return self.latent_size**2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def has_null_label(self) -> bool:
        return self.class_dropout_prob > 0

    @property
    def null_label(self) -> int:
        return self.num_classes

    @classmethod
    def from_published(cls, params: Mapping[str, Any]) -> Self:
        """From the constructor arguments of the authors' `DiTwDDTHead`.

        Raises ValueError for an unknown argument and for the options that cannot run there.
        """
        params = dict(params)
        known = {*_S.to_published(), "use_rope", "wo_shift"}
        unknown = [key for key in params if key not in known]
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        patch_size = params.pop("patch_size", 1)
        if patch_size not in (1, [1, 1], (1, 1)):
            raise ValueError(f"patch_size {patch_size!r} is not supported: only 1 is")
        for key, only in (("wo_shift", False), ("use_rope", True)):
            if (value := params.pop(key, only)) is not only:
                raise ValueError(f"{key} {value!r} is not supported: only {only} is")
        heads = params.pop("num_heads", [16, 16])
        pairs = {
            "num_heads": [heads, heads] if isinstance(heads, int) else heads,
            "hidden_size": params.pop("hidden_size", [1152, 2048]),
            "depth": params.pop("depth", [28, 2]),
        }
        for name, pair in pairs.items():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError(f"{name} {pair!r} is not a pair: [backbone, head]")
        heads, widths, depths = pairs.values()
        return cls(
            latent_channels=params.pop("in_channels", 768),
            latent_size=params.pop("input_size", 1),
            hidden_size=widths[0],
            depth=depths[0],
            num_heads=heads[0],
            head_hidden_size=widths[1],
            head_depth=depths[1],
            head_num_heads=heads[1],
            **_known(cls, params),
        )

    def to_published(self) -> dict[str, Any]:
        """The inverse of `from_published`."""
        published = {
            "latent_channels": "in_channels",
            "latent_size": "input_size",
        }
        pairs = {name: [getattr(self, name), getattr(self, f"head_{name}")] for name in PAIRS}
        single = {
            published.get(field.name, field.name): getattr(self, field.name)
            for field in fields(self)
            if field.name.removeprefix("head_") not in PAIRS
        }
        return {"patch_size": 1, **single, **pairs}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The plain DiT of `models/dit.py`; the fields mean what `DiTDHConfig`'s do."""

    latent_channels: int = 768
    latent_size: int = 16
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    use_qknorm: bool = False
    use_rmsnorm: bool = True
    use_swiglu: bool = True

    def __post_init__(self) -> None:
        require_types(self, may_be_zero=("class_dropout_prob",))
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be num_heads {self.num_heads} times a "
                "multiple of 4 (rotary pairs in two halves)"
            )
        if self.class_dropout_prob >= 1:
            raise ValueError(f"class_dropout_prob {self.class_dropout_prob} is not in [0, 1)")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        return (self.latent_channels, self.latent_size, self.latent_size)

    @property
    def has_null_label(self) -> bool:
        return self.class_dropout_prob > 0

    @property
    def null_label(self) -> int:
        return self.num_classes


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The ViT decoder of an RAE: `grid`² latent tokens to `patch_size`·`grid` pixels a side."""

    latent_channels: int = 768
    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    patch_size: int = 16
    grid: int = 16
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        require_types(self)
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads} "
                "and of 4 (sin-cos of rows and columns)"
            )

    @property
    def image_size(self) -> int:
        return self.patch_size * self.grid

    @classmethod
    def from_published(cls, params: Mapping[str, Any]) -> Self:
        """From the authors' decoder config.json names; `grid` is given beside them.

        Raises ValueError for an unknown name.
        """
        names = {
            "hidden_size": "latent_channels",
            "decoder_hidden_size": "hidden_size",
            "decoder_num_hidden_layers": "depth",
            "decoder_num_attention_heads": "num_heads",
            "decoder_intermediate_size": "intermediate_size",
        }
        return cls(**_known(cls, {names.get(key, key): value for key, value in params.items()}))


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """`image_size` is what the encoder sees: 224 for DINOv2/14 where the decoder makes 256;
    `name` says which weights, as on the hub: facebook/dinov2-with-registers-base."""

    kind: EncoderKind
    image_size: int
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(EncoderKind):
            raise ValueError(
                f"encoder kind {self.kind!r}; known: {', '.join(get_args(EncoderKind))}"
            )
        require_types(self)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Make the configuration `cls` of `values`; an unknown or a missing key raises ValueError."""
    known = _known(cls, values)
    for field in fields(cls):  # type: ignore[arg-type]
        needed = field.default is MISSING and field.default_factory is MISSING
        if needed and field.name not in known:
            raise ValueError(f"missing key {field.name!r} for {cls.__name__}")
    return cls(**known)


def _known(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    allowed = [field.name for field in fields(cls)]
    for key in values:
        if key not in allowed:
            raise ValueError(f"unknown key {key!r} for {cls.__name__}; known: {', '.join(allowed)}")
    return dict(values)


def is_number(value: object) -> bool:
    """A finite int or float; a bool is none, nor is an int beyond floats."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < sys.float_info.max


def require_types(config: object, *, may_be_zero: tuple[str, ...] = ()) -> None:
    """Integers and floats of a configuration are positive, integers not absurd, flags booleans.

    Raises ValueError that names the field.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        is_positive = is_number(value) and (value > 0 or (value == 0 and name in may_be_zero))
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name} {value!r} is not true or false")
        if kind is int and not (is_positive and isinstance(value, int)):
            raise ValueError(f"{name} {value!r} is not a positive integer")
        if kind is int and value > (MAX_DEPTH if "depth" in name else MAX_SIZE):
            raise ValueError(f"{name} {value} is beyond what a model here may have")
        if kind is float and not is_positive:
            raise ValueError(f"{name} {value!r} is not a positive number")


_S = DiTDHConfig(hidden_size=384, depth=12, num_heads=6)
_B = DiTDHConfig(hidden_size=768, depth=12, num_heads=12)
_L = DiTDHConfig(hidden_size=1024, depth=24, num_heads=16)
_XL = DiTDHConfig(hidden_size=1152, depth=28, num_heads=16)

_VIT_B = DecoderConfig(hidden_size=768, depth=12, num_heads=12, intermediate_size=3072)
_VIT_L = DecoderConfig(hidden_size=1024, depth=24, num_heads=16, intermediate_size=4096)
_VIT_XL = DecoderConfig(hidden_size=1152, depth=28, num_heads=16, intermediate_size=4096)

CONFIGS: dict[str, DiTDHConfig] = {
    "DiTDH-S-256": _S,
    "DiTDH-S-512": replace(_S, latent_size=32),
    "DiTDH-B-256": _B,
    "DiTDH-B-512": replace(_B, latent_size=32),
    "DiTDH-L-256": _L,
    "DiTDH-L-512": replace(_L, latent_size=32),
    "DiTDH-XL-256": _XL,
    "DiTDH-XL-512": replace(_XL, latent_size=32),
}

DECODER_CONFIGS: dict[str, DecoderConfig] = {
    "decoder-ViT-B-256": _VIT_B,
    "decoder-ViT-B-512": replace(_VIT_B, grid=32),
    "decoder-ViT-L-256": _VIT_L,
    "decoder-ViT-L-512": replace(_VIT_L, grid=32),
    "decoder-ViT-XL-256": _VIT_XL,
    "decoder-ViT-XL-512": replace(_VIT_XL, grid=32),
}
