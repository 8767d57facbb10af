"""The RAE authors' YAML configurations: read strictly, what is not served is refused by name.

Source: github bytetriper/RAE, `configs/`, `src/sample_ddp.py` and what these construct.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rae.models.checkpoint_config import CheckpointError, SamplerDefaults
from rae.models.config import DiTDHConfig, EncoderConfig
from rae.models.published import DECODER_FIELDS, Autoencoder, Network, Published
from rae.models.sampling import SHIFT_BASE

ENCODER_CLASSES = {"Dinov2withNorm": "dinov2", "SigLIP2wNorm": "siglip2", "MAEwNorm": "mae"}
REQUIRED: Any = object()


class Section:
    """A mapping of a YAML file, every key of which must be taken before `close`."""

    def __init__(self, name: str, values: object) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{name} {shown(values)} is not a mapping")
        self.name, self.values = name, dict(values)

    def take(self, key: str, default: Any = REQUIRED) -> Any:  # noqa: ANN401
        """Raises ValueError where a key without a default is absent."""
        value = self.values.pop(key, default)
        if value is REQUIRED:
            raise ValueError(f"{self.name} has no {key}")
        return value

    def section(self, key: str, *, optional: bool = False) -> Section:
        values = self.take(key, {} if optional else REQUIRED)
        return Section(f"{self.name}.{key}".lstrip("."), {} if values is None else values)

    def text(self, key: str, default: Any = REQUIRED) -> Any:  # noqa: ANN401
        """Text, or the default."""
        value = self.take(key, default)
        if value is not default and not isinstance(value, str):
            raise ValueError(f"{self.name}.{key} {shown(value)} is not text")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float:  # noqa: ANN401
        value = self.take(key, default)
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{self.name}.{key} {shown(value)} is not a number") from None

    def only(self, key: str, allowed: object, default: object, hint: str = "") -> None:
        """Raises ValueError that names another value than the one that is supported."""
        value = self.take(key, default)
        if value != allowed:
            raise ValueError(
                f"{self.name}.{key} {shown(value)} is not supported: only {allowed!r} is{hint}"
            )

    def close(self) -> None:
        if self.values:
            raise ValueError(f"{self.name} has unknown keys: {', '.join(map(str, self.values))}")


def read_yaml(path: Path, root: Path) -> Published:
    """One of the authors' sampling or stage-1 configurations; its paths are relative to `root`.

    Raises CheckpointError that names what cannot be read or is not supported, and its value.
    """
    try:
        import yaml
    except ImportError as error:
        raise CheckpointError(
            "YAML files need pyyaml: pip install 'rae-server[convert]'"
        ) from error
    try:
        text = path.read_text()
        if "${" in text:
            raise ValueError("${…} interpolations are not resolved: write the values out")
        values = yaml.load(text, _loader(yaml))
        return _published(path, Section("", values if isinstance(values, dict) else {}), root)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error


def shown(value: object) -> str:
    """A value as it came, cut to a readable length: a YAML file's aliases may be exponential."""
    brief = reprlib.Repr()
    brief.maxlevel = 2
    return brief.repr(value)


def _loader(yaml: ModuleType) -> Any:  # noqa: ANN401
    """PyYAML's safe loader, with 1e-5 a number as in the authors' loader (and YAML 1.2)."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _published(path: Path, top: Section, root: Path) -> Published:
    autoencoder = _autoencoder(top.section("stage_1"), root)
    source = f"{path.name}, a configuration of github bytetriper/RAE"
    if top.values.get("stage_2") is None:
        return Published(name=path.stem, autoencoder=autoencoder, source=source)
    dit_dh = _network(top.section("stage_2"), root)
    _check_transport(top.section("transport", optional=True))
    num_steps = _num_steps(top.section("sampler", optional=True))
    defaults, guide = _guidance(top.section("guidance", optional=True), num_steps, root)
    return Published(
        name=path.stem,
        autoencoder=autoencoder,
        dit_dh=dit_dh,
        guide=guide,
        shift=_shift(top.section("misc", optional=True), dit_dh.config),
        defaults=defaults,
        source=source,
    )


def _autoencoder(stage_1: Section, root: Path) -> Autoencoder:
    _require_class(stage_1, "RAE")
    params = stage_1.section("params")
    encoder_cls = params.text("encoder_cls", "Dinov2withNorm")
    kind: Any = ENCODER_CLASSES.get(encoder_cls)
    if kind is None:
        known = ", ".join(ENCODER_CLASSES)
        raise ValueError(f"{params.name}.encoder_cls {encoder_cls!r}; known: {known}")
    encoder_params = params.section("encoder_params", optional=True)
    encoder_params.only("normalize", True, True)
    processor = params.text("encoder_config_path", "")
    # The weights are loaded from here; encoder_config_path only says how pixels are normalised.
    weights = encoder_params.text("dinov2_path" if kind == "dinov2" else "model_name", processor)
    params.only("reshape_to_2d", True, True)
    params.take("noise_tau", 0)  # noise is added in training only
    encoder = EncoderConfig(
        kind=kind,
        image_size=params.take("encoder_input_size", 224),
        name=weights,
    )
    decoder = _decoder_params(root / params.text("decoder_config_path"))
    decoder["patch_size"] = params.take("decoder_patch_size", 16)
    # A whole RAE's checkpoint is loaded after, and over, the decoder's.
    decoder_file = params.text("pretrained_decoder_path", None)
    decoder_file = stage_1.text("ckpt", None) or decoder_file
    if decoder_file is None:
        raise ValueError(f"{params.name} has no pretrained_decoder_path")
    statistics = params.text("normalization_stat_path", None)
    eps = params.number("eps", 1e-5)
    params.close()
    return Autoencoder(
        decoder=decoder,
        decoder_file=root / decoder_file,
        statistics_file=root / statistics if statistics else None,
        eps=eps,
        encoder=encoder,
    )


def _decoder_params(path: Path) -> dict[str, Any]:
    """What counts in the decoder's config.json, which is one of transformers' ViTMAE."""
    path = path / "config.json" if path.suffix != ".json" else path
    try:
        values = Section(path.name, json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(
            f"{path}, the decoder's configuration, cannot be read; --root says what paths are "
            "relative to"
        ) from error
    for key, allowed in (("hidden_act", "gelu"), ("qkv_bias", True), ("num_channels", 3)):
        values.only(key, allowed, allowed)
    params = {key: values.take(key) for key in DECODER_FIELDS}
    return params | {"layer_norm_eps": values.number("layer_norm_eps", 1e-12)}


def _network(section: Section, root: Path) -> Network:
    _require_class(section, "DiTwDDTHead")
    params = section.section("params", optional=True).values
    file = section.text("ckpt", None)
    if file is None:
        raise ValueError(f"{section.name} has no ckpt: the file of its weights")
    try:
        return Network(DiTDHConfig.from_published(params), root / file)
    except ValueError as error:
        raise ValueError(f"{section.name}.params: {error}") from error


def _require_class(section: Section, name: str) -> None:
    target = section.text("target")
    if target.rpartition(".")[2] != name:
        raise ValueError(f"{section.name}.target {target!r} is not supported: only {name} is")


def _check_transport(transport: Section) -> None:
    params = transport.section("params", optional=True)
    params.only("path_type", "Linear", "Linear")
    params.only("prediction", "velocity", "velocity")
    for key in ("time_dist_type", "loss_weight", "train_eps", "sample_eps"):
        params.take(key, None)  # of training, or put to 0 for velocities
    params.close()


def _num_steps(sampler: Section) -> int:
    mode = sampler.text("mode", "ODE")
    if mode.upper() != "ODE":
        raise ValueError(f"sampler.mode {mode!r} is not supported: only 'ODE' is")
    params = sampler.section("params", optional=True)
    hint = "; `rae sample --solver` offers heun2 and midpoint on the converted model"
    params.only("sampling_method", "euler", "dopri5", hint)
    params.only("reverse", False, False)
    for key in ("atol", "rtol"):
        params.take(key, None)  # of adaptive solvers
    num_steps = params.take("num_steps", 50)
    params.close()
    return num_steps


def _guidance(
    guidance: Section, num_steps: int, root: Path
) -> tuple[SamplerDefaults, Network | None]:
    method = guidance.text("method", "cfg")
    scale = guidance.number("scale", 1.0)
    bounds = [
        guidance.number(f"t_{end}", guidance.take(f"t-{end}", default))
        for end, default in (("min", 0.0), ("max", 1.0))
    ]
    model = guidance.take("guidance_model", None)
    guidance.close()
    if method == "autoguidance" and model is None and scale > 1:
        raise ValueError("guidance.method 'autoguidance' needs a guidance.guidance_model")
    guide = _network(Section("guidance.guidance_model", model), root) if model else None
    defaults = SamplerDefaults(
        steps=num_steps,
        cfg=max(scale, 1.0),
        guidance_method=method if guide or method != "autoguidance" else "cfg",
        guidance_interval=(bounds[0], bounds[1]),
    )
    return defaults, guide


def _shift(misc: Section, config: DiTDHConfig) -> float:
    """sqrt(dim / base); the authors' sampler refuses one below 1, `default_shift` clamps."""
    expected = {
        "latent_size": list(config.latent_shape),
        "num_classes": config.num_classes,
        "null_label": config.null_label,
    }
    for key, value in expected.items():
        given = misc.take(key, value)
        if given != value:
            raise ValueError(f"misc.{key} {shown(given)}, but stage_2 has {value!r}")
    dim = misc.number("time_dist_shift_dim", math.prod(config.latent_shape))
    base = misc.number("time_dist_shift_base", SHIFT_BASE)
    if not (dim > 0 and base > 0):
        raise ValueError(f"misc.time_dist_shift_dim {dim} / base {base} is not positive")
    return max(1.0, math.sqrt(dim / base))
