"""Attention that knows where tokens stand: rotary turns, biases by distance, windows."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.transformer import Execution


def refuse_scan(family: str, execution: Execution) -> None:
    """Raises ValueError where layers are to be scanned, which takes equal ones."""
    if execution.scan_layers:
        raise ValueError(f"the layers of {family} cannot be scanned: set scan_layers=False for it")


def turned(x: Float[Array, "b s h k"], angles: Float[Array, "p k"]) -> Float[Array, "b s h k"]:
    """Turns the two halves of every head against each other: rotary positions, in float32.

    Su et al. 2021, arXiv 2104.09864.

    Args:
      angles: of the last p tokens; those before them stay. Both halves have the same.
    """
    before = x.shape[1] - angles.shape[0]
    placed = x[:, before:].astype(jnp.float32)
    one, two = jnp.split(placed, 2, axis=-1)
    cos, sin = (f(angles)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    placed = placed * cos + jnp.concatenate([-two, one], axis=-1) * sin
    return jnp.concatenate([x[:, :before], placed.astype(x.dtype)], axis=1)


def distance_buckets(places: int, buckets: int, farthest: int) -> np.ndarray:
    """Rows of a table of biases for every pair of places, int32 (places, places): query, key.

    Half of the rows are for keys behind the query. Short distances have a row each, longer ones
    share rows by their logarithm, and all from `farthest` on share the last (as in T5, Raffel et
    al. 2020, arXiv 1910.10683).
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
    """Self-attention with a bias for each pair of places, or within a window; XLA's kernel.

    Args:
      mask: True where a key is real.
      bias: added to the scores, in their scale.
      window: how far a token sees on either side; 0 sees everything.
    """
    places = jnp.arange(query.shape[1])
    near = jnp.abs(places[:, None] - places[None, :]) <= window if window else None
    seen = mask[:, None, None, :]
    seen = seen if near is None else seen & near[None, None]
    # A row without any key to look at would be NaN; it may look at everything, pooling drops it.
    seen = seen | ~jnp.any(seen, axis=-1, keepdims=True)
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=seen, implementation="xla"
    )
