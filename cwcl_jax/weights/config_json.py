"""Reads transformers' config.json into this package's settings."""

from collections.abc import Mapping
from typing import Any

Names = Mapping[str, str]  # our field -> the key in config.json

STACK: Names = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "epsilon": "layer_norm_eps",
}
# Of models with an encoder and a decoder.
ENCODER_STACK: Names = {
    "width": "d_model",
    "depth": "encoder_layers",
    "heads": "encoder_attention_heads",
    "mlp_width": "encoder_ffn_dim",
    "activation": "activation_function",
}
_ACTIVATIONS = {
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def named(content: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Returns the settings of `content` under our names.

    Raises:
      ValueError: an activation or a value is not supported.
    """
    return {ours: _value(key, content[key]) for ours, key in names.items() if key in content}


def _value(name: str, value: Any) -> Any:
    if name in ("hidden_act", "activation_function", "feat_extract_activation"):
        if value not in _ACTIVATIONS:
            raise ValueError(f"activation {value!r} is not supported")
        return _ACTIVATIONS[value]
    if isinstance(value, list) and len(set(map(repr, value))) == 1:
        value = value[0]  # both sides of a square
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}, which is not supported: expected a number")
    return value


def clip_part(
    content: Mapping[str, Any], part: str, model: str = "clip"
) -> Mapping[str, Any] | None:
    """Returns the settings of a CLIP file's part, "vision" or "text"; None for another model.

    Args:
      model: the `model_type` of the joint file, such as "siglip".
    """
    kind = content.get("model_type", "")
    if kind == f"{model}_{part}_model":
        return content
    if kind != model:
        return None
    # If an old file has both, transformers uses the second.
    old = content.get(f"{part}_config_dict")
    return (content.get(f"{part}_config") or {}) if old is None else old
