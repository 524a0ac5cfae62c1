"""A checksum of each leaf that does not depend on how the leaf lies on the mesh.

    digest = sum over elements i of mix(bits_i + i * golden)   (mod 2^32)

A sum of integers is exact in any order, so one device, eight devices and sixteen hosts get the same
number: a leaf that one mesh saved is checked on another. `mix` is the finaliser of MurmurHash3, a
bijection of 32-bit words: a change of one element is always found, a change of several with
probability 1 - 2^-32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: an odd step through all words


def digests(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns path -> checksum, the same on every process.

    Args:
      leaves: path -> global array of any shape and number type.
    """
    # One small program for each shape, not one large one for each model.
    found = {path: _digest(leaf) for path, leaf in leaves.items()}
    return {path: int(value) for path, value in jax.device_get(found).items()}


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size % 2**32) + steps
    return jnp.sum(_mix(words + place * np.uint32(_GOLDEN)), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """The bits of each element as 32-bit words; an element of 64 bits becomes two."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = min(8 * leaf.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
    return words.astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
