"""Write a ViT tower as an `.npz` in AugReg's layout, the one that ViT-L/16 is published in.

The importer reads it back, and so does any program for AugReg files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from cwcl_jax.models.vit import VitConfig

# Ours below a block -> AugReg's below an encoder block.
_BLOCK = {
    "norm1": "LayerNorm_0",
    "norm2": "LayerNorm_2",
    "attention": "MultiHeadDotProductAttention_1",
    "mlp/up": "MlpBlock_3/Dense_0",
    "mlp/down": "MlpBlock_3/Dense_1",
}


def augreg_arrays(config: VitConfig, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an AugReg file, from a ViT tower's leaves by path below the tower."""
    arrays = {
        "embedding/kernel": leaves["encoder/patch_embed/kernel"],
        "embedding/bias": leaves["encoder/patch_embed/bias"],
        "Transformer/posembed_input/pos_embedding": leaves["encoder/position_embedding"],
        "Transformer/encoder_norm/scale": leaves["encoder/norm/scale"],
        "Transformer/encoder_norm/bias": leaves["encoder/norm/bias"],
    }
    if config.class_token:
        arrays["cls"] = leaves["encoder/class_token"]
    for layer in range(config.depth):
        arrays |= _block_arrays(config, leaves, layer)
    kernel = leaves.get("head/projection/kernel")
    if kernel is not None and "head/hidden/kernel" not in leaves:
        # Programs for AugReg files expect a bias beside the head's kernel; ours has none.
        arrays |= {"head/kernel": kernel, "head/bias": np.zeros(kernel.shape[-1], np.float32)}
    return {name: np.asarray(array) for name, array in arrays.items()}


def _block_arrays(config: VitConfig, leaves: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The sixteen arrays of one layer, whether it stands alone or in a stack of layers."""

    def leaf(name: str) -> np.ndarray:
        own = leaves.get(f"encoder/blocks/{layer}/{name}")
        return np.asarray(leaves[f"encoder/blocks/{name}"][layer] if own is None else own)

    heads, size = config.heads, config.width // config.heads
    theirs = f"Transformer/encoderblock_{layer}"
    arrays = {
        f"{theirs}/{_BLOCK[part]}/{name}": leaf(f"{part}/{name}")
        for part in ("norm1", "norm2")
        for name in ("scale", "bias")
    }
    for part in ("mlp/up", "mlp/down"):
        for name in ("kernel", "bias"):
            arrays[f"{theirs}/{_BLOCK[part]}/{name}"] = leaf(f"{part}/{name}")
    attention = f"{theirs}/{_BLOCK['attention']}"
    for part in ("query", "key", "value"):
        kernel = leaf(f"attention/{part}/kernel")
        arrays[f"{attention}/{part}/kernel"] = kernel.reshape(config.width, heads, size)
        arrays[f"{attention}/{part}/bias"] = leaf(f"attention/{part}/bias").reshape(heads, size)
    out = leaf("attention/out/kernel")
    arrays[f"{attention}/out/kernel"] = out.reshape(heads, size, config.width)
    arrays[f"{attention}/out/bias"] = leaf("attention/out/bias")
    return arrays


def write_augreg_npz(
    path: Path | str,
    config: VitConfig,
    leaves: Mapping[str, Any],
    *,
    dtype: DTypeLike = np.float32,
) -> None:
    """Write the tower's leaves (by path below the tower) to `path`; float16 halves the file."""
    arrays = augreg_arrays(config, leaves)
    with Path(path).open("wb") as file:  # a handle: savez would append .npz to another ending
        np.savez(file, allow_pickle=False, **{k: x.astype(dtype) for k, x in arrays.items()})
