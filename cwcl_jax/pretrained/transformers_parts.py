"""Towers in the names, layouts and settings of the transformers library's PyTorch classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cwcl_jax.pretrained.folder import ModelDescription

Arrays = dict[str, np.ndarray]
HIDDEN_ACT = {
    "gelu_erf": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
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
_MPNET_BLOCK = _BERT_BLOCK | {
    "attention/query": "attention.attn.q",
    "attention/key": "attention.attn.k",
    "attention/value": "attention.attn.v",
    "attention/out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}
_MODERNBERT_BLOCK = {
    "norm1": "attn_norm",
    "attention/out": "attn.Wo",
    "norm2": "mlp_norm",
    "mlp/down": "mlp.Wo",
}
_TYPES = {
    "bert": "bert",
    "roberta": "roberta",
    "text": "megatron-bert",
    "mpnet": "mpnet",
    "modernbert": "modernbert",
}
_CLASSES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "megatron-bert": "MegatronBertModel",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertModel",
}
# Positions of these start after the padding id, whatever the attention mask is.
_COUNTED = ("roberta", "mpnet")


def dense(arrays: Arrays, leaves: Mapping[str, Any], ours: str, theirs: str) -> None:
    """Adds a dense layer or norm: kernels are transposed, scales are called weights."""
    kernel = leaves.get(f"{ours}/kernel")
    arrays[f"{theirs}.weight"] = leaves[f"{ours}/scale"] if kernel is None else kernel.T
    if f"{ours}/bias" in leaves:  # queries, keys and values may have none
        arrays[f"{theirs}.bias"] = leaves[f"{ours}/bias"]


def blocks(
    arrays: Arrays,
    leaves: Mapping[str, Any],
    depth: int,
    names: Mapping[str, str],
    prefix: str = "encoder.layer",
) -> None:
    """Adds all layers; `names` maps our names below a block to theirs below a layer."""
    for i in range(depth):
        for ours, theirs in names.items():
            dense(arrays, leaves, f"encoder/blocks/{i}/{ours}", f"{prefix}.{i}.{theirs}")


def stack_config(settings: Any) -> dict[str, Any]:
    """Returns the sizes and numerics that the families' config.json files share."""
    return {
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.mlp_width,
        "hidden_act": HIDDEN_ACT[settings.activation],
        "layer_norm_eps": settings.epsilon,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": 0.0,
    }


def text_model(
    encoder: str, settings: Any, leaves: Mapping[str, Any], *, pad_id: int
) -> tuple[dict[str, Any], Arrays]:
    """Returns config.json and arrays of a text encoder without pooling, in transformers' class.

    Args:
      encoder: one of bert, roberta, text (without causal attention), mpnet, modernbert.
      settings: the encoder's settings.
      leaves: leaves by path below the tower, with separate layers.
      pad_id: the padding token of the texts, after which some families start their positions.

    Raises:
      ValueError: transformers has no class that computes the same.
    """
    if encoder not in _TYPES:
        raise ValueError(
            f"encoder {encoder!r} fits no class of transformers that embeds texts: known are "
            f"{', '.join(_TYPES)}; export it as safetensors"
        )
    if getattr(settings, "causal", False):
        raise ValueError(
            "a text encoder with causal attention (causal=True) fits none of transformers' BERTs: "
            "export it as safetensors, or as clip beside an image tower of CLIP's kind"
        )
    kind = _TYPES[encoder]
    config = stack_config(settings) | {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        "vocab_size": settings.vocab_size,
        "max_position_embeddings": settings.max_tokens,
        "pad_token_id": pad_id,
    }
    if encoder == "modernbert":
        return _modernbert(config, settings, leaves)
    arrays = {
        "embeddings.word_embeddings.weight": leaves["encoder/token_embedding/embedding"],
        "embeddings.position_embeddings.weight": leaves["encoder/position_embedding/embedding"],
    }
    if encoder in _COUNTED:
        _count_from(pad_id, config, arrays, settings)
    if encoder == "mpnet":
        if pad_id != 1:
            raise ValueError(
                f"transformers' MPNet takes 1 for the padding token, and the tokenizer pads with "
                f"{pad_id}: export as safetensors"
            )
        arrays["encoder.relative_attention_bias.weight"] = leaves["encoder/distance_bias/embedding"]
        config["relative_attention_num_buckets"] = settings.buckets
    else:
        config["type_vocab_size"] = getattr(settings, "token_types", 1)
        none = np.zeros((1, settings.width), np.float32)
        arrays["embeddings.token_type_embeddings.weight"] = leaves.get(
            "encoder/type_embedding/embedding", none
        )
    names = {"text": _MEGATRON_BLOCK, "mpnet": _MPNET_BLOCK}.get(encoder, _BERT_BLOCK)
    blocks(arrays, leaves, settings.depth, names)
    if encoder == "text":
        dense(arrays, leaves, "encoder/norm", "encoder.ln")
    else:
        dense(arrays, leaves, "encoder/embedding_norm", "embeddings.LayerNorm")
    return config, arrays


def _count_from(pad_id: int, config: dict[str, Any], arrays: Arrays, settings: Any) -> None:
    """Shifts the position table so that its first used row follows the padding id."""
    offset = settings.position_offset
    if not offset:
        raise ValueError(
            "position_offset=0 counts places, and transformers' class counts the real tokens: "
            "export as safetensors"
        )
    name = "embeddings.position_embeddings.weight"
    unused = np.zeros((pad_id + 1, settings.width), np.float32)
    arrays[name] = np.concatenate([unused, arrays[name][offset:]])
    config["max_position_embeddings"] = settings.max_tokens + pad_id + 1


def _modernbert(
    config: dict[str, Any], settings: Any, leaves: Mapping[str, Any]
) -> tuple[dict[str, Any], Arrays]:
    act = config.pop("hidden_act")
    config["norm_eps"] = config.pop("layer_norm_eps")
    rate = config.pop("hidden_dropout_prob")
    del config["attention_probs_dropout_prob"]
    config |= {
        "hidden_activation": act,
        "embedding_dropout": rate,
        "mlp_dropout": rate,
        "attention_dropout": 0.0,
        # Its default ids are those of its own tokenizer, which no input here uses.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        # Names in the published files, which older and newer versions of the library read.
        "global_attn_every_n_layers": settings.global_every,
        "local_attention": settings.local_window,
        "global_rope_theta": settings.global_theta,
        "local_rope_theta": settings.local_theta,
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
    }
    if settings.local_window % 2:
        raise ValueError(f"local_window={settings.local_window} is odd: export as safetensors")
    arrays = {"embeddings.tok_embeddings.weight": leaves["encoder/token_embedding/embedding"]}
    dense(arrays, leaves, "encoder/embedding_norm", "embeddings.norm")
    dense(arrays, leaves, "encoder/norm", "final_norm")
    for i in range(settings.depth):
        ours, theirs = f"encoder/blocks/{i}", f"layers.{i}"
        for part, name in _MODERNBERT_BLOCK.items():
            if (i, part) != (0, "norm1"):  # the first layer has none
                dense(arrays, leaves, f"{ours}/{part}", f"{theirs}.{name}")
        joint = {"attn.Wqkv": ("attention", ("query", "key", "value")), "mlp.Wi": ("mlp", _GATED)}
        for name, (where, parts) in joint.items():
            kernels = [leaves[f"{ours}/{where}/{part}/kernel"].T for part in parts]
            arrays[f"{theirs}.{name}.weight"] = np.concatenate(kernels)
    return config, arrays


_GATED = ("gate", "up")


def tower_of(description: ModelDescription, modality: str) -> str:
    """Returns the name of the tower that reads "image" or "text".

    Raises:
      ValueError: there is none, or more than one.
    """
    found = [name for name, inputs in description.inputs.items() if inputs.name == modality]
    if len(found) != 1:
        what = {"image": "pictures"}.get(modality, modality)
        which = f"{' and '.join(found)} do" if found else "none does"
        raise ValueError(f"one tower must read {what} for this format, and {which}")
    return found[0]


def image_processor(description: ModelDescription, tower: str) -> dict[str, Any]:
    """Returns an image processor that matches `eval_pixels` up to fractions of a pixel."""
    settings = description.towers[tower].encoder_settings()
    inputs: Any = description.inputs[tower]
    size = settings.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size}
        if inputs.squash
        else {"shortest_edge": max(inputs.eval_resize, size)},
        "resample": int(Image.Resampling[inputs.resample.upper()]),
        "do_center_crop": not inputs.squash,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in settings.pixel_mean],
        "image_std": [value / 255 for value in settings.pixel_std],
    }


def write_json(path: Path, content: Any) -> None:
    """Writes settings as indented JSON, sorted by name."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def float32(arrays: Mapping[str, Any]) -> Arrays:
    """Returns the arrays as float32; scalars stay scalars."""
    return {name: np.asarray(x, np.float32) for name, x in arrays.items()}
