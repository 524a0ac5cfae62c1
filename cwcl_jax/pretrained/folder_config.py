"""Reads the settings of a tower from the files next to its weights.

These files are `cwcl_jax.json` of our own exports, or transformers' `config.json` (of a joint CLIP
file the part that belongs to the tower), the pixels' range in `preprocessor_config.json`, and the
pooling and dense layers of sentence-transformers. With them a folder can be used without a preset;
a wrong preset is reported as such, and so is a setting that changes the numbers but no shape.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.files import parse_json
from cwcl_jax.models.augment import SpeechAugment
from cwcl_jax.models.encoders import ENCODERS, encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.paths import is_url
from cwcl_jax.pretrained.folder import DESCRIPTION, read_description
from cwcl_jax.weights.failures import WeightsMismatch, WrongSettings
from cwcl_jax.weights.locate import locate
from cwcl_jax.weights.sentence_folder import (
    SentenceFolder,
    encoder_folder,
    read_sentence_folder,
)

# Encoders of the pairs that transformers saves in one folder, by model_type in config.json.
PAIRS = {
    "clip": {"image": "vit", "text": "text"},
    "siglip": {"image": "siglip", "text": "siglip_text"},
}
# Settings that only affect training and are a choice of each run.
_OF_TRAINING = {
    "dropout",
    "patch_dropout",
    *(field.name for field in dataclasses.fields(SpeechAugment)),
}
# Settings that change the numbers but no shape. A difference is an error,
_UNSEEN = (
    "heads", "activation", "scale_embedding", "causal", "dilations", "position_offset",
    "pad_token", "rope_theta", "strides", "conv_activation", "stable_norm", "normalize_waveform",
    "max_distance", "global_every", "local_window", "global_theta", "local_theta",
    "frequency_stride", "time_stride",
)  # fmt: skip
# and for these an error unless overridden by name.
_FRONT_END = (
    "pixel_mean", "pixel_std", "low_hz", "high_hz", "dynamic_range", "feature_mean", "feature_std",
)  # fmt: skip


def settings_of_folder(path: Path, encoder: str) -> dict[str, Any]:
    """Returns the encoder settings in the files next to weights; empty without such files."""
    folder = _folder(path)
    if encoder not in ENCODERS:
        return {}
    if (folder / DESCRIPTION).exists():
        return _of_own_export(folder, encoder)
    check_kind(path, encoder)  # before anything else is compared, such as a tokenizer
    settings = _of_transformers(_config_file(encoder_folder(folder)), encoder)
    if ENCODERS[encoder].modality == "image":
        settings |= _pixel_range(folder)
    return settings | _of_processor(folder, encoder)


def _config_file(folder: Path) -> Path:
    """Returns transformers' file, or OpenCLIP's if there is none."""
    own = folder / "open_clip_config.json"
    return own if own.exists() and not (folder / "config.json").exists() else folder / "config.json"


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if there is no such file."""
    if not file.exists():
        return {}
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: holds a {type(content).__name__}, not a JSON object: fetch it again"
        )
    return content


def _of_own_export(folder: Path, encoder: str) -> dict[str, Any]:
    found = [
        _lasting(encoder_config(encoder, tower.preset, tower.overrides, tower.pooling))
        for tower in read_description(folder, allow_code=True).towers.values()
        if tower.encoder == encoder
    ]
    return found[0] if found and all(settings == found[0] for settings in found) else {}


def _lasting(settings: Any) -> dict[str, Any]:
    """Returns the fields that belong to the weights."""
    fields = dataclasses.asdict(settings)
    return {name: value for name, value in fields.items() if name not in _OF_TRAINING}


def _of_transformers(file: Path, encoder: str) -> dict[str, Any]:
    content = _json(file)
    try:
        settings = ENCODERS[encoder].read_config(content) if content else {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return {name: value for name, value in settings.items() if name not in _OF_TRAINING}


def _processor(folder: Path) -> tuple[Path, Any]:
    """Returns the file next to weights that describes the inputs' preparation, and its content."""
    file = folder / "preprocessor_config.json"
    if not file.exists():
        file = folder / "processor_config.json"
    content = _json(file)
    return file, content.get("image_processor", content.get("feature_extractor", content))


def _of_processor(folder: Path, encoder: str) -> dict[str, Any]:
    """Returns the settings that the encoder family itself reads from that file."""
    file, content = _processor(folder)
    try:
        return ENCODERS[encoder].read_processor(content) if content else {}
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _pixel_range(folder: Path) -> dict[str, Any]:
    """Returns mean and spread of 0..255 pixels, from an image processor's rescaled ones."""
    file, content = _processor(folder)
    if not isinstance(content, dict) or not {"image_mean", "image_std"} <= set(content):
        return {}
    factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0
    pixels = content["image_mean"], content["image_std"]
    if not content.get("do_normalize", True):
        pixels = [0.0] * 3, [1.0] * 3
    try:
        mean, std = (np.asarray(x, np.float64).reshape(3) / factor for x in pixels)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: image_mean {pixels[0]!r} and image_std {pixels[1]!r} are not three numbers "
            "each: set pixel_mean and pixel_std (of 0..255) in the tower's overrides"
        ) from error
    return {
        "pixel_mean": tuple(mean.round(6).tolist()),
        "pixel_std": tuple(std.round(6).tolist()),
    }


def sentence_parts(path: Path, config: TowerConfig) -> SentenceFolder:
    """Returns what sentence-transformers stored with a text encoder; empty for other towers."""
    family, folder = ENCODERS.get(config.encoder), _folder(path)
    if family is None or family.modality != "text" or (folder / DESCRIPTION).exists():
        return SentenceFolder(folder)
    return read_sentence_folder(folder, pooling_is_chosen=_pooling_is_chosen(config))


def _pooling_is_chosen(config: TowerConfig) -> bool:
    return bool(config.pooling) or "pooling" in config.overrides


def _sentence_settings(path: Path, config: TowerConfig) -> dict[str, Any]:
    """Returns pooling and dense layers of the folder, without those that the tower overrides."""
    parts = sentence_parts(path, config)
    found = {"dense": parts.dense, "pooling": parts.pooling}
    if _pooling_is_chosen(config):
        del found["pooling"]
    known = {field.name for field in dataclasses.fields(ENCODERS[config.encoder].config_class)}
    if parts.dense and "dense" not in known:
        raise ValueError(
            f"{path}: its vectors also pass through {parts.dense_folders[0].name} "
            f"({parts.dense}), which encoder {config.encoder!r} does not have"
        )
    return {name: x for name, x in found.items() if x and name not in config.overrides}


def complete(config: TowerConfig) -> TowerConfig:
    """Returns a tower with its weights' settings if it has no preset; overrides take precedence.

    With or without a preset, external weights run as their authors published them.
    """
    if not config.weights or config.encoder not in ENCODERS:
        return config
    settings: dict[str, Any] = {}
    remote = is_url(config.weights)
    local = locate(config.weights) if remote else Path(config.weights).expanduser()
    if not (_folder(local) / DESCRIPTION).exists():
        settings |= ENCODERS[config.encoder].as_published
    if not config.preset:
        path = locate(config.weights)
        settings |= settings_of_folder(path, config.encoder)
        settings |= _sentence_settings(path, config)
    if not settings:
        return config
    return dataclasses.replace(config, overrides=settings | dict(config.overrides))


def explain_sizes(path: Path, config: TowerConfig) -> str:
    """Returns where a folder's settings differ from the tower, and the presets that would fit."""
    found = settings_of_folder(path, config.encoder)
    choices = {"pooling", "end_token", *_FRONT_END}
    sizes = {name: value for name, value in found.items() if name not in choices}
    different = _different(sizes, config)
    if not different:
        return ""
    different |= _different(_front_end(found, config), config)
    presets: Mapping[str, Any] = ENCODERS[config.encoder].presets
    fitting = [
        name
        for name, preset in presets.items()
        if all(_same(getattr(preset, field), value) for field, value in sizes.items())
    ]
    hint = f"preset {fitting[0]!r} fits" if fitting else "an empty preset takes the file's sizes"
    return f"its {_named_by(path)} has {_listed(different)}: {hint}"


def check_settings(path: Path, config: TowerConfig) -> None:
    """Compares settings that no shape shows with the folder's files.

    Raises:
      WrongSettings: the tower would compute something other than the weights' own model; it tells
        all differences.
    """
    parts = [part for pair in _disagreements(path, config) for part in pair]
    if parts:
        raise WrongSettings(str(path), "; ".join(parts[:-1]), remedy=parts[-1])


def _disagreements(path: Path, config: TowerConfig) -> Iterator[tuple[str, str]]:
    """Yields each difference and its remedy."""
    yield from _of_sentence_parts(path, config)
    found = settings_of_folder(path, config.encoder)
    unseen = {name: found[name] for name in _UNSEEN if name in found}
    different = _different(unseen | _front_end(found, config), config)
    if different:
        yield (
            f"fits the tower in shape, but its {_named_by(path)} has {_listed(different)}",
            "set these in the tower's overrides; an empty preset takes all from the file",
        )


def _front_end(found: Mapping[str, Any], config: TowerConfig) -> dict[str, Any]:
    """Returns a folder's settings of the inputs, without those that the tower overrides."""
    names = [name for name in _FRONT_END if name in found and name not in config.overrides]
    return {name: found[name] for name in names}


def check_kind(path: Path, encoder: str) -> None:
    """Compares the model_type of config.json with the tower's encoder.

    Raises:
      WeightsMismatch: it is another model, whose arrays may have the same names and shapes.
    """
    family = ENCODERS.get(encoder)
    if family is None or not family.model_types or (_folder(path) / DESCRIPTION).exists():
        return
    kind = _json(encoder_folder(_folder(path)) / "config.json").get("model_type")
    if kind is None or kind in family.model_types:
        return
    # A pair has two readers, and SigLIP 2 of any shape as well: the one of this tower's modality.
    readers = [name for name, other in ENCODERS.items() if kind in other.model_types]
    readers.sort(key=lambda name: ENCODERS[name].modality != family.modality)
    raise WeightsMismatch(
        str(path),
        f"is a {kind}, as its config.json says, and no {' or '.join(family.model_types)}, which "
        f"encoder {encoder!r} reads",
        remedy=f"set the tower's encoder to {readers[0]!r}" if readers else "no encoder reads it",
    )


def _of_sentence_parts(path: Path, config: TowerConfig) -> Iterator[tuple[str, str]]:
    """Yields where pooling and dense layers of the sentence-transformers model around it differ."""
    if config.encoder not in ENCODERS:
        return
    theirs, ours = sentence_parts(path, config), config.encoder_settings()
    missing = _sentence_settings(path, config).get("dense", "")
    if missing and missing != ours.dense:
        yield (
            f"has dense layers {missing!r} behind its pooling, as its modules.json "
            f"says, and {_settings_name(config)} has {ours.dense!r}",
            "set dense in the tower's overrides to the folder's, or to '' on purpose",
        )
    on_purpose = config.overrides.get("pooling") == getattr(ours, "pooling", None)
    if theirs.pooling and theirs.pooling != ours.pooling and not on_purpose:
        name = f"pooling={config.pooling!r}" if config.pooling else _settings_name(config)
        yield (
            f"pools by {theirs.pooling!r}, as its {theirs.pooling_file.parent.name} says, and "
            f"{name} by {ours.pooling!r}",
            f"set the tower's pooling to {theirs.pooling!r}; put a different one on purpose into "
            "its overrides",
        )


def _settings_name(config: TowerConfig) -> str:
    return f"the preset {config.preset!r}" if config.preset else "the tower"


def _different(settings: Mapping[str, Any], config: TowerConfig) -> dict[str, Any]:
    chosen = config.encoder_settings()
    return {
        name: value for name, value in settings.items() if not _same(getattr(chosen, name), value)
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return np.allclose(one, other)  # a range, rounded in the file or here
    return one == other


def _named_by(path: Path) -> str:
    folder = _folder(path)
    if (folder / DESCRIPTION).exists():
        return DESCRIPTION
    config = _config_file(folder)
    return config.name if config.exists() else "preprocessor_config.json"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())
