"""Writes a folder that `transformers.VisionTextDualEncoderModel.from_pretrained` opens.

That class reads each tower's `pooler_output` through a bias-free projection. Our towers fit as
follows:

- ViT, class token: `ViTModel`, whose pooler is set to the identity without an activation.
- BERT and RoBERTa: their own classes. BERT's pooler always applies tanh. If our tower uses the
  plain first token, the pooler is a tiny multiple of the identity, on which tanh is linear to
  float32's precision, and the projection undoes the factor.
- Text from scratch with pooling "cls": Megatron-BERT, the pre-norm BERT, in the same way.

Mean pooling has no counterpart among these classes; such a model is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.pretrained.folder import ModelDescription, below
from cwcl_jax.pretrained.image_folder import vit_model
from cwcl_jax.pretrained.transformers_parts import (
    Arrays,
    dense,
    float32,
    image_processor,
    text_model,
    write_json,
)
from cwcl_jax.weights.writers import write_safetensors

# tanh(x) = x (1 - x^2 / 3 + ...): below float32's resolution for features up to 10.
_TINY = 2.0**-14


def write_dual_encoder(
    folder: Path, description: ModelDescription, leaves: Mapping[str, Any]
) -> None:
    """Writes the folder: config, weights, image processor and the tokenizer's files.

    Raises:
      ValueError: the towers do not fit these classes.
    """
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
    write_json(folder / "preprocessor_config.json", image_processor(description, "image"))
    text_inputs: Any = description.inputs["text"]
    text_inputs.loaded.save(folder)
    write_safetensors(folder / "model.safetensors", float32(arrays), metadata={"format": "pt"})
    write_json(folder / "config.json", config)


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
    model = vit_model(settings, leaves, None)
    del model.config["architectures"]
    return model.config, model.arrays, 1.0


def _text(description: ModelDescription, leaves: Arrays) -> tuple[dict[str, Any], Arrays, float]:
    settings = _settings(description, "text")
    encoder = description.towers["text"].encoder
    causal = getattr(settings, "causal", False)
    known = encoder in ("bert", "roberta", "text")
    if not known or settings.pooling not in ("cls", "pooler") or causal:
        raise ValueError(
            f"the text tower ({encoder}, pooling {settings.pooling!r}) does not fit a "
            "VisionTextDualEncoder, which takes bert, roberta or text with pooling='cls' (or "
            "'pooler'), not causal: export as safetensors, or train with pooling='cls'"
        )
    inputs: Any = description.inputs["text"]
    extra = "dense layers" if getattr(settings, "dense", "") else ""
    extra = extra or (f"a prompt, {inputs.loaded.prompt!r}," if inputs.loaded.prompt else "")
    if extra:
        raise ValueError(
            f"the text tower has {extra} and a VisionTextDualEncoder none: export as safetensors, "
            "or the tower as sentence-transformers"
        )
    offset = getattr(settings, "position_offset", 0)
    config, arrays = text_model(encoder, settings, leaves, pad_id=offset - 1 if offset else 0)
    del config["architectures"]
    if settings.pooling == "pooler":
        dense(arrays, leaves, "encoder/pooler", "pooler.dense")
        return config, arrays, 1.0
    arrays["pooler.dense.weight"] = _TINY * np.eye(settings.width, dtype=np.float32)
    arrays["pooler.dense.bias"] = np.zeros(settings.width, np.float32)
    return config, arrays, _TINY
