"""Sizes of a tower from the `config.json` that transformers writes beside weights.

With it a folder can be used without a preset, and a wrong preset is named as such.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cwcl_jax.models.encoders import ENCODERS, encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.locate import locate

_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
_STACK = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}
_ENCODER_STACK = {
    "width": "d_model",
    "depth": "encoder_layers",
    "heads": "encoder_attention_heads",
    "mlp_width": "encoder_ffn_dim",
    "activation": "activation_function",
}
_BERT = _STACK | {"vocab_size": "vocab_size", "token_types": "type_vocab_size"}
# Encoder -> our field -> the key in config.json.
_FIELDS: dict[str, dict[str, str]] = {
    "vit": _STACK | {"image_size": "image_size", "patch_size": "patch_size"},
    "bert": _BERT | {"max_tokens": "max_position_embeddings"},
    "roberta": _BERT | {"max_tokens": "max_position_embeddings"},
    "bart": _ENCODER_STACK
    | {
        "vocab_size": "vocab_size",
        "max_tokens": "max_position_embeddings",
        "scale_embedding": "scale_embedding",
    },
    "whisper": _ENCODER_STACK
    | {"mel_bins": "num_mel_bins", "max_positions": "max_source_positions"},
}
_MODEL_TYPES = {"xlm-roberta": "roberta", "camembert": "roberta"}


def sizes_of_folder(path: Path, encoder: str) -> dict[str, Any]:
    """The encoder's settings that a folder's config.json names; empty without such a file."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if encoder not in _FIELDS or not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file: {error}") from error
    kind = content.get("model_type", encoder)
    if _MODEL_TYPES.get(kind, kind) != encoder:
        return {}
    sizes = {
        ours: content[theirs] for ours, theirs in _FIELDS[encoder].items() if theirs in content
    }
    if "activation" in sizes:
        name = sizes["activation"]
        if name not in _ACTIVATIONS:
            raise ValueError(f"{file}: activation {name!r} is not supported")
        sizes["activation"] = _ACTIVATIONS[name]
    if encoder == "roberta" and "max_tokens" in sizes:
        sizes["max_tokens"] -= ENCODERS["roberta"].config_class.position_offset
    return sizes


def complete(config: TowerConfig) -> TowerConfig:
    """A tower without preset gets the sizes of its weights' folder; overrides stay on top."""
    if config.preset or not config.weights:
        return config
    sizes = sizes_of_folder(locate(config.weights), config.encoder)
    return dataclasses.replace(config, overrides=sizes | dict(config.overrides))


def explain_sizes(path: Path, config: TowerConfig) -> str:
    """Where a folder's config.json differs from the tower, and the presets that would fit it."""
    sizes = sizes_of_folder(path, config.encoder)
    chosen = encoder_config(config.encoder, config.preset, config.overrides, config.pooling)
    different = {name: value for name, value in sizes.items() if getattr(chosen, name) != value}
    if not different:
        return ""
    listed = ", ".join(f"{name}={value!r}" for name, value in different.items())
    presets: Mapping[str, Any] = ENCODERS[config.encoder].presets
    fitting = [
        name
        for name, preset in presets.items()
        if all(getattr(preset, field) == value for field, value in sizes.items())
    ]
    hint = f"preset {fitting[0]!r} fits" if fitting else "an empty preset takes the file's sizes"
    return f"its config.json has {listed}: {hint}"
