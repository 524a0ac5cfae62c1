"""OpenCLIP's own files: names in `open_clip_pytorch_model`, settings in `open_clip_config.json`.

The towers are CLIP's; query, key and value of a layer are in one array.
"""

from collections.abc import Mapping
from typing import Any

from cwcl_jax.models.layer_names import in_projection
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import apart, flax_names


def _view(weights: Weights) -> Weights:
    """Returns a view with Flax's names, and separate query, key and value."""
    return apart(flax_names(weights), in_projection, turned=True)


def _layers(prefix: str) -> list[Rule]:
    layer, ours = rf"{prefix}transformer/resblocks/(\d+)", r"encoder/blocks/\1"
    return [
        Rule(rf"{layer}/ln_([12])/(scale|bias)", rf"{ours}/norm\2/\3"),
        Rule(rf"{layer}/attn/(query|key|value)/(kernel|bias)", rf"{ours}/attention/\2/\3"),
        Rule(rf"{layer}/attn/out_proj/(kernel|bias)", rf"{ours}/attention/out/\2"),
        Rule(rf"{layer}/mlp/c_fc/(kernel|bias)", rf"{ours}/mlp/up/\2"),
        Rule(rf"{layer}/mlp/c_proj/(kernel|bias)", rf"{ours}/mlp/down/\2"),
    ]


_TEXT_ONLY = (
    r"(text/)?(token_embedding|transformer|ln_final|text_projection)/.*",
    r"(text/)?(positional_embedding|text_projection|attn_mask)",
)
VISION = Layout(
    name="OpenCLIP image",
    signature=r"visual[./]class_embedding",
    view=_view,
    rules=[
        Rule(r"visual/class_embedding", "encoder/class_token", "one_token"),
        Rule(r"visual/conv1/kernel", "encoder/patch_embed/kernel"),
        Rule(r"visual/positional_embedding", "encoder/position_embedding", "table_to_grid"),
        Rule(r"visual/ln_pre/(scale|bias)", r"encoder/embedding_norm/\1"),
        *_layers("visual/"),
        Rule(r"visual/ln_post/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"visual/proj", "head/projection/kernel", optional=True),
    ],
    ignore=[*_TEXT_ONLY, r"logit_(scale|bias)"],
)
TEXT = Layout(
    name="OpenCLIP text",
    signature=r"(text[./])?ln_final[./](weight|scale)",
    view=_view,
    rules=[
        Rule(r"(?:text/)?token_embedding/embedding", "encoder/token_embedding/embedding"),
        Rule(r"(?:text/)?positional_embedding", "encoder/position_embedding/embedding"),
        *_layers("(?:text/)?"),
        Rule(r"(?:text/)?ln_final/(scale|bias)", r"encoder/norm/\1"),
        Rule(r"(?:text/)?text_projection(?:/kernel)?", "head/projection/kernel", optional=True),
    ],
    ignore=[r"visual/.*", r"logit_(scale|bias)", r"(text/)?attn_mask"],
)

_USUAL_VISION = {"head_width": 64, "mlp_ratio": 4.0, "image_size": 224}
_USUAL_TEXT = {"mlp_ratio": 4.0, "context_length": 77, "vocab_size": 49408}
# Values that do not change the function, or that are another name for the default.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "patch_dropout": (0, 0.0), "pool_type": ("tok", "argmax"), "ls_init_value": (None,),
    "hf_model_name": (None,), "timm_model_name": (None,), "attentional_pool": (False,),
    "no_causal_mask": (False,), "embed_cls": (False,), "output_tokens": (False,),
}  # fmt: skip


def _part(content: Mapping[str, Any], part: str, usual: Mapping[str, Any]) -> dict[str, Any]:
    """Returns one tower's settings, in OpenCLIP's names.

    Raises:
      ValueError: it is not a CLIP model, or has parts that a tower does not have.
    """
    given = content["model_cfg"].get(f"{part}_cfg") or {}
    known = {*usual, "layers", "width", "patch_size", "heads"}
    for name, value in given.items():
        # Names of tokenizers concern the text, not the tower.
        fine = name in known or name.endswith(("tokenizer_name", "tokenizer_kwargs"))
        if not fine and value not in _PLAIN.get(name, ()):
            raise ValueError(f"model_cfg.{part}_cfg.{name}={value!r} is not supported")
    settings = dict(usual) | {name: given[name] for name in known if name in given}
    if not isinstance(settings.get("layers"), int) or not isinstance(settings.get("width"), int):
        raise ValueError(
            f"model_cfg.{part}_cfg is not a transformer with a single width: not supported"
        )
    return settings


def _stack(content: Mapping[str, Any], part: Mapping[str, Any], heads: int) -> dict[str, Any]:
    return {
        "width": part["width"],
        "depth": part["layers"],
        "heads": heads,
        "mlp_width": int(part["width"] * part["mlp_ratio"]),
        "activation": "quick_gelu" if content["model_cfg"].get("quick_gelu") else "gelu_erf",
        "epsilon": 1e-5,
    }


def read_image(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `vit` for an open_clip_config.json."""
    part = _part(content, "vision", _USUAL_VISION)
    settings = _stack(content, part, part["width"] // part["head_width"])
    settings |= {"image_size": part["image_size"], "patch_size": part["patch_size"]}
    settings |= {"patch_bias": False, "embedding_norm": True}
    # CLIP's own range is the default.
    usual = {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    }
    asked = content.get("preprocess_cfg", {})
    for ours, theirs in (("pixel_mean", "mean"), ("pixel_std", "std")):
        value = asked.get(theirs, usual[theirs])
        settings[ours] = tuple(round(255 * float(x), 6) for x in value)
    return settings


def read_text(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of `text` for an open_clip_config.json.

    A text ends at its highest id.
    """
    part = _part(content, "text", _USUAL_TEXT)
    if "heads" not in part:
        raise ValueError("model_cfg.text_cfg names no heads: not supported")
    return _stack(content, part, part["heads"]) | {
        "vocab_size": part["vocab_size"],
        "max_tokens": part["context_length"],
        "causal": True,
        "pooling": "end",
        "end_token": -1,
    }
