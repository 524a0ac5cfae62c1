"""Labels of pairs: integers, or sets of integers as rows filled up with -1."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_INT32 = np.iinfo(np.int32)


def exact_labels(labels: Any) -> Any:
    """Labels that 32 bits can tell apart: larger integers are numbered anew, -1 stays.

    jax keeps the lower half of a 64-bit integer, in which two large ids may be one.
    """
    if labels is None or isinstance(labels, jax.Array):
        return labels
    array = np.asarray(labels)
    fits = not array.size or (array.min() >= _INT32.min and array.max() <= _INT32.max)
    if array.dtype.kind not in "iu" or fits:
        return labels
    numbers = np.unique(array, return_inverse=True)[1].reshape(array.shape)
    return np.where(array == -1, -1, numbers).astype(np.int32)


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
