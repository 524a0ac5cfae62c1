"""Attention that depends on positions: rotary positions, biases by distance, windows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.transformer import Execution


def refuse_scan(family: str, execution: Execution) -> None:
    """Raises ValueError if layers are to be scanned, which requires equal layers."""
    if execution.scan_layers:
        raise ValueError(f"the layers of {family} cannot be scanned: set scan_layers=False for it")


def turned(x: Float[Array, "b s h k"], angles: Float[Array, "p k"]) -> Float[Array, "b s h k"]:
    """Returns x with rotary positions: the halves of every head are rotated, in float32.

    Su et al. 2021, arXiv 2104.09864.

    Args:
      angles: angles of the last p tokens, equal for both halves; earlier tokens are unchanged.
    """
    before = x.shape[1] - angles.shape[0]
    placed = x[:, before:].astype(jnp.float32)
    one, two = jnp.split(placed, 2, axis=-1)
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    placed = placed * cos + jnp.concatenate([-two, one], axis=-1) * sin
    return jnp.concatenate([x[:, :before], placed.astype(x.dtype)], axis=1)


def distance_buckets(places: int, buckets: int, farthest: int) -> np.ndarray:
    """Returns the row of a bias table for every pair of positions, int32: (query, key).

    Half of the rows are for keys after the query. Short distances have one row each, longer ones
    share rows by their logarithm, and all distances from `farthest` share the last row (as in T5,
    Raffel et al. 2020, arXiv 1910.10683).
    """
    half = buckets // 2
    exact = half // 2
    ahead = np.arange(places)[None, :] - np.arange(places)[:, None]
    distance = np.abs(ahead)
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    share = share / np.float32(np.log(farthest / exact)) * np.float32(half - exact)
    coarse = np.minimum(exact + share.astype(np.int64), half - 1)
    rows = np.where(distance < exact, distance, coarse)
    return (rows + (ahead > 0) * half).astype(np.int32)


def attend_pairs(
    query: Float[Array, "b s h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    mask: Bool[Array, "b s"],
    *,
    bias: Float[Array, "#b h s s"] | None = None,
    window: int = 0,
) -> Float[Array, "b s h k"]:
    """Returns self-attention with a bias for each pair of positions, or in a window; XLA's kernel.

    Args:
      mask: True where a key is real.
      bias: added to the scores, in their scale.
      window: how many tokens on each side are attended to; 0 means all.
    """
    places = jnp.arange(query.shape[1])
    near = jnp.abs(places[:, None] - places[None, :]) <= window if window else None
    seen = mask[:, None, None, :]
    seen = seen if near is None else seen & near[None, None]
    # A row without any key would be NaN; it may attend to everything, because pooling drops it.
    seen = seen | ~jnp.any(seen, axis=-1, keepdims=True)
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=seen, implementation="xla"
    )
