"""Labels of pairs: integers, or sets of integers as rows filled up with -1."""

import jax.numpy as jnp
from jaxtyping import Array


def label_sets(labels: Array) -> Array:
    """(n, k) sets of labels without repetitions; missing entries are -1."""
    rows = jnp.sort(labels, axis=1)
    again = jnp.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(again | (rows < 0), -1, rows)


def common_labels(a: Array, b: Array) -> Array:
    """How many labels two sets have in common, for all pairs of rows."""
    count = jnp.zeros((len(a), len(b)), jnp.int32)
    for x in a.T:
        for y in b.T:
            count += (x[:, None] == y[None, :]) & (x >= 0)[:, None]
    return count


def same_labels(a: Array, b: Array) -> Array:
    """Which pairs of rows have equal labels; empty sets equal none."""
    if a.ndim == 1:
        return a[:, None] == b[None, :]
    sizes = [(x >= 0).sum(axis=1) for x in (a, b)]
    common = common_labels(a, b)
    return (common == sizes[0][:, None]) & (common == sizes[1][None, :]) & (common > 0)


def label_weights(a: Array, b: Array, overlap: float, dtype: jnp.dtype) -> Array:
    """1 for equal labels, `overlap` for sets that have a label in common, else 0."""
    same = same_labels(a, b).astype(dtype)
    if a.ndim == 1 or not overlap:
        return same
    return jnp.maximum(same, overlap * (common_labels(a, b) > 0).astype(dtype))
