"""Writes a model's image tower as a folder for `AutoImageProcessor` and a class of transformers.

    vit                 ViTModel, whose pooler is the head: `pooler_output`
    vit of CLIP's kind  CLIPVisionModelWithProjection: `image_embeds`
    siglip              SiglipVisionModel: `pooler_output`
    dinov2              Dinov2Model: `pooler_output`; with a head or a mean over the patches
                        Dinov2ForImageClassification, whose classifier is the head: `logits`
    dinov3              DINOv3ViTModel: `pooler_output`

This output is the embedding before normalisation to unit length. Anything that these classes cannot
compute is refused. The importer reads the encoders back.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cwcl_jax.pretrained.clip_folder import CLIP_BLOCK, clip_stack, clip_vision_arrays
from cwcl_jax.pretrained.folder import ModelDescription, below
from cwcl_jax.pretrained.transformers_parts import (
    Arrays,
    blocks,
    dense,
    float32,
    image_processor,
    stack_config,
    tower_of,
    write_json,
)
from cwcl_jax.weights.writers import write_safetensors

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
_DINOV2_BLOCK = {
    name: theirs for name, theirs in _VIT_BLOCK.items() if name.startswith("attention/")
} | {"norm1": "norm1", "norm2": "norm2"}
_DINOV3_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.o_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


class ImageModel(NamedTuple):
    """A tower in transformers' format: config.json and the arrays of model.safetensors."""

    config: dict[str, Any]
    arrays: Arrays


def opened_as(description: ModelDescription) -> tuple[str, str]:
    """Returns the class of transformers that opens the folder, and the field of the embeddings."""
    tower = description.towers[tower_of(description, "image")]
    settings = tower.encoder_settings()
    if tower.encoder == "vit" and settings.embedding_norm:
        return "CLIPVisionModelWithProjection", "image_embeds"
    if tower.encoder == "dinov2" and _needs_classifier(settings, tower.head != "none"):
        return "AutoModelForImageClassification", "logits"
    return "AutoModel", "pooler_output"


def _needs_classifier(settings: Any, has_head: bool) -> bool:
    """Returns whether a DINOv2's embeddings are not just its class token."""
    return has_head or settings.pooling != "cls"


def write_image_folder(
    folder: Path, description: ModelDescription, leaves: Mapping[str, Any]
) -> None:
    """Writes the image tower; config.json comes last, so that a folder with it is complete.

    Raises:
      ValueError: there is not exactly one image tower, or transformers has no class for it.
    """
    name = tower_of(description, "image")
    model = image_model(description, below(leaves, name))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "preprocessor_config.json", image_processor(description, name))
    arrays = float32(model.arrays)
    write_safetensors(folder / "model.safetensors", arrays, metadata={"format": "pt"})
    write_json(folder / "config.json", model.config)


def image_model(description: ModelDescription, leaves: Arrays) -> ImageModel:
    """Returns the image tower as the class of transformers that computes its embeddings.

    Args:
      leaves: the tower's leaves, by path below it, with separate leaves for each layer.

    Raises:
      ValueError: there is no such class.
    """
    tower = description.towers[tower_of(description, "image")]
    settings = tower.encoder_settings()
    if tower.encoder not in _WRITERS:
        raise ValueError(
            f"encoder {tower.encoder!r} fits no class of transformers that embeds pictures: known "
            f"are {', '.join(_WRITERS)}; export as safetensors"
        )
    if tower.head not in ("none", "linear"):
        raise ValueError(
            f"head={tower.head!r} fits no class of transformers that embeds pictures: export as "
            "safetensors, or train with head='linear'"
        )
    head = leaves["head/projection/kernel"].T if tower.head == "linear" else None
    return _WRITERS[tower.encoder](settings, leaves, head)


def _refuse(what: str, kind: str) -> None:
    raise ValueError(f"transformers' {kind} has no {what}: export as safetensors")


def vit_model(settings: Any, leaves: Arrays, head: np.ndarray | None) -> ImageModel:
    """Returns a ViT whose class token is its feature; `head` (embed, width) becomes its pooler.

    A ViT with a norm between embeddings and blocks becomes a CLIPVisionModelWithProjection.

    Raises:
      ValueError: the class of transformers cannot compute it, e.g. because of its pooling.
    """
    if settings.embedding_norm:
        return _clip_model(settings, leaves, head)
    if settings.pooling != "cls":
        _refuse(f"pooling {settings.pooling!r}, only 'cls'", "ViTModel")
    head = np.eye(settings.width, dtype=np.float32) if head is None else head
    config = stack_config(settings) | {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "qkv_bias": settings.qkv_bias,
        "pooler_act": "linear",
        "pooler_output_size": len(head),
    }
    arrays = _embeddings(leaves, "embeddings.patch_embeddings.projection") | {
        "embeddings.position_embeddings": leaves["encoder/position_embedding"],
        "pooler.dense.weight": head,
        "pooler.dense.bias": np.zeros(len(head), np.float32),
    }
    blocks(arrays, leaves, settings.depth, _VIT_BLOCK)
    dense(arrays, leaves, "encoder/norm", "layernorm")
    return ImageModel(config, arrays)


def _embeddings(leaves: Arrays, patches: str) -> Arrays:
    """Returns class token and patches; a kernel without a bias gets a bias of zeros."""
    kernel = leaves["encoder/patch_embed/kernel"]
    zeros = np.zeros(kernel.shape[-1], np.float32)
    arrays = {
        f"{patches}.weight": kernel.transpose(3, 2, 0, 1),
        f"{patches}.bias": leaves.get("encoder/patch_embed/bias", zeros),
    }
    if "encoder/class_token" in leaves:
        arrays["embeddings.cls_token"] = leaves["encoder/class_token"]
    return arrays


def _clip_model(settings: Any, leaves: Arrays, head: np.ndarray | None) -> ImageModel:
    if settings.pooling != "cls" or settings.patch_bias or not settings.qkv_bias:
        _refuse(
            f"pooling={settings.pooling!r}, patch_bias={settings.patch_bias}, "
            f"qkv_bias={settings.qkv_bias}, only 'cls', False, True",
            "CLIPVisionModelWithProjection",
        )
    kernel = np.eye(settings.width, dtype=np.float32) if head is None else head
    config = clip_stack(settings, "clip_vision_model") | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "projection_dim": len(kernel),
    }
    arrays = clip_vision_arrays(settings, leaves) | {"visual_projection.weight": kernel}
    return ImageModel(config, arrays)


def _siglip_model(settings: Any, leaves: Arrays, head: np.ndarray | None) -> ImageModel:
    if head is not None or settings.pooling != "attention":
        what = f"pooling {settings.pooling!r}" if head is None else "head behind its pooling"
        _refuse(what, "SiglipVisionModel")
    config = stack_config(settings) | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "attention_dropout": 0.0,
    }
    del config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]
    part, pool = "vision_model", "vision_model.head"
    arrays = _embeddings(leaves, f"{part}.embeddings.patch_embedding")
    table = leaves["encoder/position_embedding"][0]
    arrays[f"{part}.embeddings.position_embedding.weight"] = table
    blocks(arrays, leaves, settings.depth, CLIP_BLOCK, prefix=f"{part}.encoder.layers")
    dense(arrays, leaves, "encoder/norm", f"{part}.post_layernorm")
    arrays[f"{pool}.probe"] = leaves["encoder/pooling/probe"]
    joint = [leaves[f"encoder/pooling/{name}/kernel"].T for name in ("query", "key", "value")]
    arrays[f"{pool}.attention.in_proj_weight"] = np.concatenate(joint)
    joint = [leaves[f"encoder/pooling/{name}/bias"] for name in ("query", "key", "value")]
    arrays[f"{pool}.attention.in_proj_bias"] = np.concatenate(joint)
    for ours, theirs in (
        ("out", "attention.out_proj"), ("norm", "layernorm"), ("mlp/up", "mlp.fc1"),
        ("mlp/down", "mlp.fc2"),
    ):  # fmt: skip
        dense(arrays, leaves, f"encoder/pooling/{ours}", f"{pool}.{theirs}")
    return ImageModel(config, arrays)


def _dinov2_model(settings: Any, leaves: Arrays, head: np.ndarray | None) -> ImageModel:
    kind, prefix = "Dinov2", "dinov2"
    if settings.registers:
        kind, prefix = "Dinov2WithRegisters", "dinov2_with_registers"
    registers = {"num_register_tokens": settings.registers} if settings.registers else {}
    config = (
        _without_mlp_width(settings)
        | registers
        | {
            "model_type": prefix,
            "image_size": settings.image_size,
            "patch_size": settings.patch_size,
            "qkv_bias": settings.qkv_bias,
            "use_swiglu_ffn": settings.gated,
        }
    )
    arrays = _embeddings(leaves, "embeddings.patch_embeddings.projection")
    if settings.registers:
        arrays["embeddings.register_tokens"] = leaves["encoder/registers"]
    arrays["embeddings.mask_token"] = np.zeros((1, settings.width), np.float32)
    arrays["embeddings.position_embeddings"] = leaves["encoder/position_embedding"]
    names = dict(_DINOV2_BLOCK)
    if not settings.gated:
        names |= {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
    blocks(arrays, leaves, settings.depth, names)
    for i in range(settings.depth):
        _scales(arrays, leaves, i, f"encoder.layer.{i}")
        if settings.gated:
            _joint_gate(arrays, leaves, i)
    dense(arrays, leaves, "encoder/norm", "layernorm")
    if not _needs_classifier(settings, head is not None):
        config["architectures"] = [f"{kind}Model"]
        return ImageModel(config, arrays)
    # The classifier reads class token and mean of the patches, concatenated.
    head = np.eye(settings.width, dtype=np.float32) if head is None else head
    halves = [head, np.zeros_like(head)]
    arrays = {f"{prefix}.{name}": x for name, x in arrays.items()}
    arrays["classifier.weight"] = np.concatenate(
        halves if settings.pooling == "cls" else halves[::-1], axis=1
    )
    arrays["classifier.bias"] = np.zeros(len(head), np.float32)
    config |= {
        "architectures": [f"{kind}ForImageClassification"],
        "id2label": {str(i): f"dimension {i}" for i in range(len(head))},
        "label2id": {f"dimension {i}": i for i in range(len(head))},
    }
    return ImageModel(config, arrays)


def _scales(arrays: Arrays, leaves: Arrays, layer: int, prefix: str) -> None:
    for number in (1, 2):
        ours = leaves[f"encoder/blocks/{layer}/scale{number}"]
        arrays[f"{prefix}.layer_scale{number}.lambda1"] = ours


def _joint_gate(arrays: Arrays, leaves: Arrays, layer: int) -> None:
    """Writes gate and up of a gated MLP as one array, as in published files."""
    ours, theirs = f"encoder/blocks/{layer}/mlp", f"encoder.layer.{layer}.mlp"
    parts = [leaves[f"{ours}/{part}/kernel"].T for part in ("gate", "up")]
    arrays[f"{theirs}.weights_in.weight"] = np.concatenate(parts)
    parts = [leaves[f"{ours}/{part}/bias"] for part in ("gate", "up")]
    arrays[f"{theirs}.weights_in.bias"] = np.concatenate(parts)
    dense(arrays, leaves, f"{ours}/down", f"{theirs}.weights_out")


def _without_mlp_width(settings: Any) -> dict[str, Any]:
    """Returns the stack's settings with the MLP width as a multiple of the width, as in DINOv2.

    Raises:
      ValueError: it is not such a multiple.
    """
    config = stack_config(settings)
    del config["intermediate_size"]
    width = settings.width
    for ratio in range(1, 17):
        hidden = width * ratio
        if settings.gated:
            hidden = (hidden * 2 // 3 + 7) // 8 * 8
        if hidden == settings.mlp_width:
            if settings.gated:  # its activation is fixed
                config["hidden_act"] = "gelu"
            return config | {"mlp_ratio": ratio}
    raise ValueError(
        f"mlp_width={settings.mlp_width} is no multiple of width={width} as Dinov2Model counts "
        "it: export as safetensors"
    )


def _dinov3_model(settings: Any, leaves: Arrays, head: np.ndarray | None) -> ImageModel:
    if head is not None or settings.pooling != "cls":
        what = f"pooling {settings.pooling!r}" if head is None else "head behind its class token"
        _refuse(what, "DINOv3ViTModel")
    config = stack_config(settings) | {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "image_size": settings.image_size,
        "patch_size": settings.patch_size,
        "query_bias": settings.qkv_bias,
        "value_bias": settings.qkv_bias,
        "key_bias": settings.key_bias,
        "num_register_tokens": settings.registers,
        "use_gated_mlp": settings.gated,
        "rope_theta": settings.rope_theta,
    }
    del config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]
    arrays = _embeddings(leaves, "embeddings.patch_embeddings")
    arrays["embeddings.register_tokens"] = leaves.get(
        "encoder/registers", np.zeros((1, 0, settings.width), np.float32)
    )
    arrays["embeddings.mask_token"] = np.zeros((1, 1, settings.width), np.float32)
    names = _DINOV3_BLOCK | ({"mlp/gate": "mlp.gate_proj"} if settings.gated else {})
    blocks(arrays, leaves, settings.depth, names, prefix="layer")
    for i in range(settings.depth):
        _scales(arrays, leaves, i, f"layer.{i}")
    dense(arrays, leaves, "encoder/norm", "norm")
    return ImageModel(config, arrays)


_WRITERS: dict[str, Callable[[Any, Arrays, np.ndarray | None], ImageModel]] = {
    "vit": vit_model,
    "siglip": _siglip_model,
    "dinov2": _dinov2_model,
    "dinov3": _dinov3_model,
}
