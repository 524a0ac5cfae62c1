"""Labels of pairs: integers, or sets of integers as rows padded with -1."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_INT32 = np.iinfo(np.int32)


def exact_labels(labels: Any) -> Any:
    """Returns labels that fit into 32 bits: larger integers are renumbered, -1 is kept.

    JAX truncates 64-bit integers to 32 bits, so two different large ids could become equal.

    Raises:
      ValueError: labels are words.
    """
    if labels is None or isinstance(labels, jax.Array):
        return labels
    array = np.asarray(labels)
    if array.dtype.kind in "USO":
        raise ValueError(f"labels must be integers, not {array.dtype}: number the names first.")
    if array.dtype.kind not in "iu":  # floats are refused by the loss
        return labels
    fits = not array.size or (array.min() >= _INT32.min and array.max() <= _INT32.max)
    if fits:
        return labels
    numbers = np.unique(array, return_inverse=True)[1].reshape(array.shape)
    return np.where(array == -1, -1, numbers).astype(np.int32)


def label_sets(labels: Array) -> Array:
    """Returns (n, k) sets of labels without repetitions; missing entries are -1."""
    rows = jnp.sort(labels, axis=1)
    again = jnp.pad(rows[:, 1:] == rows[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(again | (rows < 0), -1, rows)


def common_labels(a: Array, b: Array) -> Array:
    """Returns the number of labels that two sets share, for all pairs of rows."""
    valid, columns = a >= 0, a.T

    def add(place, count):
        # The loop unrolls one side only: unrolling all pairs would take minutes to compile.
        y = jax.lax.dynamic_index_in_dim(b, place, axis=1, keepdims=False)
        for x, there in zip(columns, valid.T, strict=True):
            count += (x[:, None] == y[None, :]) & there[:, None]
        return count

    return jax.lax.fori_loop(0, b.shape[1], add, jnp.zeros((len(a), len(b)), jnp.int32))


def same_labels(a: Array, b: Array) -> Array:
    """Returns which pairs of rows have equal labels; an empty set equals no other set."""
    if a.ndim == 1:
        return a[:, None] == b[None, :]
    return _all_in_common(a, b, common_labels(a, b))


def _all_in_common(a: Array, b: Array, common: Array) -> Array:
    sizes = [(x >= 0).sum(axis=1) for x in (a, b)]
    return (common == sizes[0][:, None]) & (common == sizes[1][None, :]) & (common > 0)


def label_weights(a: Array, b: Array, overlap: float, dtype: jnp.dtype) -> Array:
    """Returns 1 for equal labels, `overlap` for sets that share a label, and 0 otherwise."""
    if a.ndim == 1 or not overlap:
        return same_labels(a, b).astype(dtype)
    common = common_labels(a, b)
    same = _all_in_common(a, b, common).astype(dtype)
    return jnp.maximum(same, overlap * (common > 0).astype(dtype))
