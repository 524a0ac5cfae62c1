"""Writes a folder that `transformers.CLIPModel` and `CLIPProcessor` open, for pairs like CLIP.

Such a pair is a ViT with a norm before its blocks and its class token as features, and a causal
text transformer read at its end token, both with linear heads. `load_model` builds such a pair from
a CLIP file, and runs that start from it keep it. Other towers compute something that CLIPModel
cannot.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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

CLIP_BLOCK = {
    "norm1": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
# An end token of this id marks files from before the id was stored (see `models.text`).
_MARK = 2


def write_clip_folder(
    folder: Path, description: ModelDescription, leaves: Mapping[str, Any]
) -> None:
    """Writes config, weights, image processor and tokenizer; config.json comes last.

    Raises:
      ValueError: the towers are not like CLIP's; the message says what differs.
    """
    image, text = _towers(description)
    vision, words = _settings(description, image), _settings(description, text)
    picture, written = below(leaves, image), below(leaves, text)
    tokenizer: Any = description.inputs[text].loaded  # type: ignore[attr-defined]
    end = _end_token(description, text, tokenizer)
    arrays = clip_vision_arrays(vision, picture) | _text_arrays(words, written)
    arrays["visual_projection.weight"] = _projection(description, image, picture)
    arrays["text_projection.weight"] = _projection(description, text, written)
    arrays["logit_scale"] = np.asarray(leaves["logit_scale"], np.float32)
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": description.embed_dim,
        "logit_scale_init_value": float(arrays["logit_scale"]),
        "vision_config": clip_stack(vision, "clip_vision_model")
        | {"image_size": vision.image_size, "patch_size": vision.patch_size}
        | {"projection_dim": description.embed_dim},
        "text_config": clip_stack(words, "clip_text_model")
        | {"vocab_size": words.vocab_size, "max_position_embeddings": words.max_tokens}
        | {"eos_token_id": end, "bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        | {"projection_dim": description.embed_dim},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_json(folder / "preprocessor_config.json", image_processor(description, image))
    write_safetensors(folder / "model.safetensors", float32(arrays), metadata={"format": "pt"})
    write_json(folder / "config.json", config)


def _settings(description: ModelDescription, tower: str) -> Any:
    return description.towers[tower].encoder_settings()


def _towers(description: ModelDescription) -> tuple[str, str]:
    """Returns the names of the image and the text tower, both like CLIP's."""
    text = tower_of(description, "text")
    images = [name for name, inputs in description.inputs.items() if inputs.name == "image"]
    if len(images) != 1:
        raise ValueError("a CLIPModel has an image and a text tower: export as safetensors")
    image = images[0]
    encoders = {image: "vit", text: "text"}
    wanted = {
        image: {"embedding_norm": True, "patch_bias": False, "qkv_bias": True, "pooling": "cls"},
        text: {"causal": True},
    }
    for name, encoder in encoders.items():
        tower = description.towers[name]
        if tower.encoder != encoder:
            raise ValueError(
                f"the {name} tower is a {tower.encoder}, and CLIPModel's a {encoder}: export as "
                "transformers or safetensors"
            )
        settings = tower.encoder_settings()
        other = [
            f"{field}={getattr(settings, field)!r} (CLIP: {value!r})"
            for field, value in wanted[name].items()
            if getattr(settings, field) != value
        ]
        if tower.head not in ("none", "linear"):
            other.append(f"head={tower.head!r} (CLIP: 'linear')")
        if other:
            raise ValueError(
                f"the {name} tower is not of CLIP's kind, {', '.join(other)}: export as "
                "transformers or safetensors"
            )
    return image, text


def _end_token(description: ModelDescription, text: str, tokenizer: Any) -> int:
    """Returns the token id at whose first position CLIPModel reads a text."""
    settings = _settings(description, text)
    if tokenizer.prompt:
        raise ValueError(f"a CLIPModel has no prompt {tokenizer.prompt!r}: export as safetensors")
    if settings.pooling == "end":
        # -1 is the highest id of a text, which CLIP's mark stands for
        return _MARK if settings.end_token < 0 else settings.end_token
    if settings.pooling != "last":
        raise ValueError(
            f"the {text} tower pools by {settings.pooling!r}, and CLIPModel reads the end token "
            "('end' or 'last'): export as safetensors"
        )
    end = tokenizer.eos_id
    if end is None or end == _MARK or not _ends_with(tokenizer, end):
        raise ValueError(
            f"pooling 'last' is CLIPModel's where every text ends with its end token, and it is no "
            f"token {_MARK}; that of {tokenizer.name!r} is {end}: export as safetensors"
        )
    return end


def _ends_with(tokenizer: Any, end: int) -> bool:
    """Returns whether the tokenizer appends `end` to every text."""
    made = tokenizer(["a"])
    return int(made["tokens"][0][made["mask"][0]][-1]) == end


def clip_stack(settings: Any, kind: str) -> dict[str, Any]:
    """Returns a tower's stack of blocks as CLIP's config.json writes it."""
    config = stack_config(settings) | {"model_type": kind, "attention_dropout": 0.0}
    del config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]
    return config


def _layers(arrays: Arrays, leaves: Arrays, depth: int, part: str) -> Arrays:
    blocks(arrays, leaves, depth, CLIP_BLOCK, prefix=f"{part}.encoder.layers")
    return arrays


def clip_vision_arrays(settings: Any, leaves: Arrays) -> Arrays:
    """Returns the image tower's arrays without its projection, from its leaves by path."""
    part = "vision_model"
    arrays = {
        f"{part}.embeddings.class_embedding": leaves["encoder/class_token"].reshape(-1),
        f"{part}.embeddings.patch_embedding.weight": leaves["encoder/patch_embed/kernel"].transpose(
            3, 2, 0, 1
        ),
        f"{part}.embeddings.position_embedding.weight": leaves["encoder/position_embedding"][0],
    }
    dense(arrays, leaves, "encoder/embedding_norm", f"{part}.pre_layrnorm")
    dense(arrays, leaves, "encoder/norm", f"{part}.post_layernorm")
    return _layers(arrays, leaves, settings.depth, part)


def _text_arrays(settings: Any, leaves: Arrays) -> Arrays:
    part = "text_model"
    arrays = {
        f"{part}.embeddings.{name}_embedding.weight": leaves[f"encoder/{name}_embedding/embedding"]
        for name in ("token", "position")
    }
    dense(arrays, leaves, "encoder/norm", f"{part}.final_layer_norm")
    return _layers(arrays, leaves, settings.depth, part)


def _projection(description: ModelDescription, tower: str, leaves: Arrays) -> np.ndarray:
    if description.towers[tower].head == "none":
        return np.eye(description.embed_dim, dtype=np.float32)
    return leaves["head/projection/kernel"].T
