"""A folder that `transformers.VisionTextDualEncoderModel.from_pretrained` opens.

That class reads each tower's `pooler_output` through a bias-free projection. Ours fits as follows:

- ViT, class token: `ViTModel`, whose pooler is set to the identity without an activation.
- BERT and RoBERTa: their own classes. BERT's pooler always applies tanh; where our tower takes the
  plain first token, the pooler is a tiny multiple of the identity, on which tanh is linear to
  float32's precision, and the projection undoes the factor.
- Text from scratch with pooling "cls": Megatron-BERT, the pre-norm BERT, in the same way.

Mean pooling has no counterpart among these classes; such a model is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.pretrained.folder import ModelDescription, below
from cwcl_jax.weights.writers import write_safetensors

Arrays = dict[str, np.ndarray]
_HIDDEN_ACT = {
    "gelu_erf": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# tanh(x) = x (1 - x^2 / 3 + ...): below float32's resolution for features up to 10.
_TINY = 2.0**-14

_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_BERT_BLOCK = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "norm2": "output.LayerNorm",
}
_MEGATRON_BLOCK = _BERT_BLOCK | {"norm1": "attention.ln", "norm2": "ln"}


def write_dual_encoder(
    folder: Path, description: ModelDescription, leaves: Mapping[str, Any]
) -> None:
    """Write the folder: config, weights, image processor and the tokenizer's files."""
    if set(description.towers) != {"image", "text"}:
        raise ValueError(
            f"a VisionTextDualEncoder has an image and a text tower; this model has "
            f"{' and '.join(sorted(description.towers))}: export it as safetensors"
        )
    vision, vision_arrays, vision_scale = _vision(description, below(leaves, "image"))
    text, text_arrays, text_scale = _text(description, below(leaves, "text"))
    log_scale = np.asarray(leaves["logit_scale"], np.float32)
    arrays = {f"vision_model.{name}": x for name, x in vision_arrays.items()}
    arrays |= {f"text_model.{name}": x for name, x in text_arrays.items()}
    arrays["visual_projection.weight"] = _projection(description, leaves, "image") / vision_scale
    arrays["text_projection.weight"] = _projection(description, leaves, "text") / text_scale
    arrays["logit_scale"] = log_scale
    config = {
        "architectures": ["VisionTextDualEncoderModel"],
        "model_type": "vision-text-dual-encoder",
        "projection_dim": description.embed_dim,
        "logit_scale_init_value": float(log_scale),
        "vision_config": vision,
        "text_config": text,
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "preprocessor_config.json", _image_processor(description))
    text_inputs: Any = description.inputs["text"]
    text_inputs.loaded.save(folder)
    plain = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    write_safetensors(folder / "model.safetensors", plain, metadata={"format": "pt"})
    _write_json(folder / "config.json", config)


def _settings(description: ModelDescription, modality: str) -> Any:
    return description.towers[modality].encoder_settings()


def _projection(
    description: ModelDescription, leaves: Mapping[str, Any], modality: str
) -> np.ndarray:
    head = description.towers[modality].head
    if head == "none":
        return np.eye(description.embed_dim, dtype=np.float32)
    if head != "linear":
        raise ValueError(
            f"towers.{modality}.head={head!r} does not fit a VisionTextDualEncoder, whose "
            "projections are linear: export as safetensors, or train with head='linear'"
        )
    kernel = leaves[f"towers/{modality}/head/projection/kernel"]
    return np.asarray(kernel).astype(np.float32).T


def _dense(arrays: Arrays, leaves: Arrays, ours: str, theirs: str) -> None:
    """Dense layers and norms: kernels are transposed, scales are called weights."""
    kernel = leaves.get(f"{ours}/kernel")
    arrays[f"{theirs}.weight"] = leaves[f"{ours}/scale"] if kernel is None else kernel.T
    if f"{ours}/bias" in leaves:  # queries, keys and values may have none
        arrays[f"{theirs}.bias"] = leaves[f"{ours}/bias"]


def _blocks(arrays: Arrays, leaves: Arrays, depth: int, names: Mapping[str, str]) -> None:
    for i in range(depth):
        for ours, theirs in names.items():
            _dense(arrays, leaves, f"encoder/blocks/{i}/{ours}", f"encoder.layer.{i}.{theirs}")


def _stack_config(settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.mlp_width,
        "hidden_act": _HIDDEN_ACT[settings.activation],
        "layer_norm_eps": settings.epsilon,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": 0.0,
    }


def _vision(description: ModelDescription, leaves: Arrays) -> tuple[dict[str, Any], Arrays, float]:
    settings = _settings(description, "image")
    encoder = description.towers["image"].encoder
    if encoder != "vit" or settings.pooling != "cls":
        raise ValueError(
            f"the image tower ({encoder}, pooling {getattr(settings, 'pooling', 'none')!r}) does "
            "not fit a VisionTextDualEncoder, which takes a ViT with pooling='cls': export as "
            "safetensors or npz"
        )
    if "encoder/embedding_norm/scale" in leaves:
        raise ValueError(
            "the image tower's norm between embeddings and blocks, as in CLIP, does not fit a "
            "VisionTextDualEncoder's ViT: export as safetensors"
        )
    config = _stack_config(settings) | {
        "model_type": "vit",
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "qkv_bias": settings.qkv_bias,
        "pooler_act": "linear",
        "pooler_output_size": settings.width,
    }
    arrays = {
        "embeddings.cls_token": leaves["encoder/class_token"],
        "embeddings.position_embeddings": leaves["encoder/position_embedding"],
        "embeddings.patch_embeddings.projection.weight": leaves[
            "encoder/patch_embed/kernel"
        ].transpose(3, 2, 0, 1),
        "embeddings.patch_embeddings.projection.bias": leaves.get(
            "encoder/patch_embed/bias", np.zeros(settings.width, np.float32)
        ),
        "pooler.dense.weight": np.eye(settings.width, dtype=np.float32),
        "pooler.dense.bias": np.zeros(settings.width, np.float32),
    }
    _blocks(arrays, leaves, settings.depth, _VIT_BLOCK)
    _dense(arrays, leaves, "encoder/norm", "layernorm")
    return config, arrays, 1.0


def _text(description: ModelDescription, leaves: Arrays) -> tuple[dict[str, Any], Arrays, float]:
    settings = _settings(description, "text")
    encoder = description.towers["text"].encoder
    types = {"bert": "bert", "roberta": "roberta", "text": "megatron-bert"}
    causal = getattr(settings, "causal", False)
    if encoder not in types or settings.pooling not in ("cls", "pooler") or causal:
        raise ValueError(
            f"the text tower ({encoder}, pooling {settings.pooling!r}) does not fit a "
            "VisionTextDualEncoder, which takes bert, roberta or text with pooling='cls' (or "
            "'pooler'), not causal: export as safetensors, or train with pooling='cls'"
        )
    offset = getattr(settings, "position_offset", 0)
    config = _stack_config(settings) | {
        "model_type": types[encoder],
        "vocab_size": settings.vocab_size,
        "max_position_embeddings": settings.max_tokens + offset,
        "type_vocab_size": getattr(settings, "token_types", 1),
        "pad_token_id": offset - 1 if offset else 0,
    }
    none = np.zeros((1, settings.width), np.float32)
    arrays = {
        "embeddings.word_embeddings.weight": leaves["encoder/token_embedding/embedding"],
        "embeddings.position_embeddings.weight": leaves["encoder/position_embedding/embedding"],
        "embeddings.token_type_embeddings.weight": leaves.get(
            "encoder/type_embedding/embedding", none
        ),
    }
    if encoder == "text":
        _blocks(arrays, leaves, settings.depth, _MEGATRON_BLOCK)
        _dense(arrays, leaves, "encoder/norm", "encoder.ln")
    else:
        _blocks(arrays, leaves, settings.depth, _BERT_BLOCK)
        _dense(arrays, leaves, "encoder/embedding_norm", "embeddings.LayerNorm")
    if settings.pooling == "pooler":
        _dense(arrays, leaves, "encoder/pooler", "pooler.dense")
        return config, arrays, 1.0
    arrays["pooler.dense.weight"] = _TINY * np.eye(settings.width, dtype=np.float32)
    arrays["pooler.dense.bias"] = np.zeros(settings.width, np.float32)
    return config, arrays, _TINY


def _image_processor(description: ModelDescription) -> dict[str, Any]:
    """As `eval_pixels`, but for parts of a pixel: the shorter side resized, then cut."""
    settings = _settings(description, "image")
    inputs: Any = description.inputs["image"]
    size = settings.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": max(inputs.eval_resize, size)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in settings.pixel_mean],
        "image_std": [value / 255 for value in settings.pixel_std],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
