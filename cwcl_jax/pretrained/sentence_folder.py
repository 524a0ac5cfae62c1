"""Writes a model's text tower as a folder that `sentence_transformers.SentenceTransformer` opens.

Its `encode` returns the tower's embeddings: the encoder as transformers' own class, the pooling,
dense layers (a trained linear head is one, without a bias), and normalisation. The importer can
read the folder, with `head="none"`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.models.dense import DenseLayer, layers_of
from cwcl_jax.pretrained.folder import ModelDescription, below
from cwcl_jax.pretrained.transformers_parts import (
    dense,
    float32,
    text_model,
    tower_of,
    write_json,
)
from cwcl_jax.weights.sentence_folder import MODULES, PROMPTS, TEXT_SETTINGS
from cwcl_jax.weights.writers import write_safetensors

# Our poolings -> their names in files of every version.
_POOLINGS = {
    "cls": "cls_token",
    "pooler": "cls_token",
    "max": "max_tokens",
    "mean": "mean_tokens",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "last": "lasttoken",
}
_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
    "silu": "torch.nn.modules.activation.SiLU",
    "gelu_erf": "torch.nn.modules.activation.GELU",
    "relu": "torch.nn.modules.activation.ReLU",
}
_KIND = "sentence_transformers.models."


def write_sentence_folder(
    folder: Path, description: ModelDescription, leaves: Mapping[str, Any]
) -> None:
    """Writes the text tower; `modules.json` comes last, so a folder that has one is complete.

    Raises:
      ValueError: sentence-transformers has no modules that compute the same.
    """
    name = tower_of(description, "text")
    tower = description.towers[name]
    inputs: Any = description.inputs[name]
    tokenizer: Any = inputs.loaded
    settings, arrays = tower.encoder_settings(), below(leaves, name)
    if settings.pooling not in _POOLINGS:
        raise ValueError(
            f"sentence-transformers has no pooling {settings.pooling!r}: export as safetensors"
        )
    if "pad_token" not in tokenizer.special_tokens:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} has no padding token, which sentence-transformers "
            "needs: export as safetensors"
        )
    layers = _layers(tower.head, settings, arrays)
    config, encoder = text_model(tower.encoder, settings, arrays, pad_id=tokenizer.pad_id)
    if config["model_type"] in ("bert", "roberta", "megatron-bert"):
        # Their classes have a pooler, which is not used here.
        encoder["pooler.dense.weight"] = np.zeros((settings.width, settings.width), np.float32)
        encoder["pooler.dense.bias"] = np.zeros(settings.width, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    write_safetensors(folder / "model.safetensors", float32(encoder), metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    write_json(
        folder / TEXT_SETTINGS, {"max_seq_length": inputs.max_tokens, "do_lower_case": False}
    )
    write_json(folder / PROMPTS, _prompts(tokenizer.prompt))
    _write_modules(folder, settings, layers)


def _layers(
    head: str, settings: Any, leaves: Mapping[str, np.ndarray]
) -> list[tuple[DenseLayer, np.ndarray, np.ndarray | None]]:
    """Returns the dense layers after the pooling, each with its kernel (in, out) and bias."""
    layers = []
    if settings.pooling == "pooler":
        place = "encoder/pooler"
        layer = DenseLayer(settings.width, "tanh")
        layers.append((layer, leaves[f"{place}/kernel"], leaves[f"{place}/bias"]))
    for number, layer in enumerate(layers_of(getattr(settings, "dense", ""))):
        place = f"encoder/dense/{number}/linear"
        layers.append((layer, leaves[f"{place}/kernel"], leaves.get(f"{place}/bias")))
    if head == "linear":
        kernel = leaves["head/projection/kernel"]
        layers.append((DenseLayer(kernel.shape[1], "identity", bias=False), kernel, None))
    elif head != "none":
        raise ValueError(
            f"head={head!r} begins with a norm that sentence-transformers has with another "
            "epsilon: export as safetensors, or train with head='linear'"
        )
    for layer, _, _ in layers:
        if layer.activation not in _ACTIVATIONS:
            raise ValueError(
                f"sentence-transformers' Dense has no activation {layer.activation!r}: export as "
                "safetensors"
            )
    return layers


def _prompts(prompt: str) -> dict[str, Any]:
    """Returns the prompt under every name that `encode` and related methods look up."""
    names = ("default", "query", "document") if prompt else ()
    return {
        "__version__": {},
        "model_type": "SentenceTransformer",
        "prompts": dict.fromkeys(names, prompt),
        "default_prompt_name": "default" if prompt else None,
        "similarity_fn_name": "cosine",
    }


def _write_modules(folder: Path, settings: Any, layers: list[Any]) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    chosen = _POOLINGS[settings.pooling]
    pooling: dict[str, Any] = {"word_embedding_dimension": settings.width, "include_prompt": True}
    pooling |= {f"pooling_mode_{mode}": mode == chosen for mode in set(_POOLINGS.values())}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    for layer, kernel, bias in layers:
        name = f"{len(modules)}_Dense"
        (folder / name).mkdir(exist_ok=True)
        content = {
            "in_features": kernel.shape[0],
            "out_features": layer.width,
            "bias": layer.bias,
            "activation_function": _ACTIVATIONS[layer.activation],
        }
        write_json(folder / name / "config.json", content)
        leaves: dict[str, np.ndarray] = {}
        dense(
            leaves, {"x/kernel": kernel} | ({} if bias is None else {"x/bias": bias}), "x", "linear"
        )
        file = folder / name / "model.safetensors"
        write_safetensors(file, float32(leaves), metadata={"format": "pt"})
        modules.append((name, "Dense"))
    modules.append((f"{len(modules)}_Normalize", "Normalize"))
    (folder / modules[-1][0]).mkdir(exist_ok=True)
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": _KIND + kind}
        for number, (path, kind) in enumerate(modules)
    ]
    write_json(folder / MODULES, listed)
