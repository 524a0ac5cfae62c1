"""Writes a ViT tower as an `.npz` in AugReg's layout, in which ViT-L/16 is published.

The importer and all programs for AugReg files can read it. The layout has every bias: one that a
tower lacks is written as zeros, which is the same function.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cwcl_jax.models.vit import VitConfig

# Our names below a block -> AugReg's names below an encoder block.
_BLOCK = {
    "norm1": "LayerNorm_0",
    "norm2": "LayerNorm_2",
    "attention": "MultiHeadDotProductAttention_1",
    "mlp/up": "MlpBlock_3/Dense_0",
    "mlp/down": "MlpBlock_3/Dense_1",
}


def augreg_arrays(config: VitConfig, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of an AugReg file, from a ViT tower's leaves by path below the tower.

    Args:
      leaves: leaves with separate layers, as returned by `folder.below`.

    Raises:
      ValueError: the tower has parts that the layout does not have.
    """
    _check_fits(leaves)
    arrays = {
        "embedding/kernel": leaves["encoder/patch_embed/kernel"],
        "embedding/bias": leaves.get("encoder/patch_embed/bias", _zeros(config.width)),
        "Transformer/posembed_input/pos_embedding": leaves["encoder/position_embedding"],
        "Transformer/encoder_norm/scale": leaves["encoder/norm/scale"],
        "Transformer/encoder_norm/bias": leaves["encoder/norm/bias"],
    }
    if config.class_token:
        arrays["cls"] = leaves["encoder/class_token"]
    for layer in range(config.depth):
        arrays |= _block_arrays(config, leaves, layer)
    kernel = leaves.get("head/projection/kernel")
    if kernel is not None:
        # Programs for AugReg files expect a bias with the head's kernel; ours has none.
        arrays |= {"head/kernel": kernel, "head/bias": _zeros(kernel.shape[-1])}
    return {name: np.asarray(array) for name, array in arrays.items()}


def _check_fits(leaves: Mapping[str, Any]) -> None:
    other = {
        "head/hidden/kernel": "head='mlp', and AugReg's is linear",
        "encoder/embedding_norm/scale": "a norm between embeddings and blocks, as in CLIP",
    }
    for path, what in other.items():
        if path in leaves:
            raise ValueError(
                f"the image tower does not fit AugReg's layout: it has {what}; export it as "
                "safetensors"
            )


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _block_arrays(config: VitConfig, leaves: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Returns the sixteen arrays of one layer."""
    ours = f"encoder/blocks/{layer}"
    heads, size = config.heads, config.width // config.heads
    theirs = f"Transformer/encoderblock_{layer}"
    arrays = {
        f"{theirs}/{_BLOCK[part]}/{name}": leaves[f"{ours}/{part}/{name}"]
        for part, names in (
            ("norm1", ("scale", "bias")),
            ("norm2", ("scale", "bias")),
            ("mlp/up", ("kernel", "bias")),
            ("mlp/down", ("kernel", "bias")),
        )
        for name in names
    }
    attention = f"{theirs}/{_BLOCK['attention']}"
    for part in ("query", "key", "value"):
        kernel = leaves[f"{ours}/attention/{part}/kernel"]
        bias = leaves.get(f"{ours}/attention/{part}/bias", _zeros(config.width))
        arrays[f"{attention}/{part}/kernel"] = kernel.reshape(config.width, heads, size)
        arrays[f"{attention}/{part}/bias"] = bias.reshape(heads, size)
    out = leaves[f"{ours}/attention/out/kernel"]
    arrays[f"{attention}/out/kernel"] = out.reshape(heads, size, config.width)
    arrays[f"{attention}/out/bias"] = leaves[f"{ours}/attention/out/bias"]
    return arrays


def write_augreg_npz(
    path: Path | str,
    config: VitConfig,
    leaves: Mapping[str, Any],
    *,
    dtype: DTypeLike = np.float32,
) -> None:
    """Writes the tower's leaves (by path below the tower) to `path`; float16 halves the file."""
    arrays = augreg_arrays(config, leaves)
    # a handle, because savez would append .npz to another ending
    with Path(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **{k: x.astype(dtype) for k, x in arrays.items()})
