"""A checksum of each leaf that does not depend on how the leaf is laid out on the mesh.

    digest = sum over elements i of mix(bits_i + i * golden)   (mod 2^32)

A sum of integers is exact in any order, so one device, eight devices and sixteen hosts get the same
number: a leaf that one mesh saved can be verified on another. `mix` is the finaliser of
MurmurHash3, a bijection of 32-bit words: a change of one element is always detected, a change of
several with probability 1 - 2^-32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: odd, so that multiples visit every word
_BLOCK = 1 << 11  # words per iteration of the loop on a CPU: they fit into its fastest cache


def digests(leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns path -> checksum, the same on every process.

    Args:
      leaves: path -> global array of any shape and number type.
    """
    # One small program per shape, instead of a large one per model.
    found = {path: _start(leaf) for path, leaf in leaves.items()}
    return {path: int(value) for path, value in jax.device_get(found).items()}


def _start(leaf: jax.Array) -> jax.Array:
    """Starts computing a leaf's checksum, in the form that suits its devices."""
    in_blocks = leaf.dtype.itemsize <= 4 and leaf.size >= _BLOCK and leaf.is_fully_replicated
    if in_blocks and all(device.platform == "cpu" for device in leaf.devices()):
        return _digest_in_blocks(leaf.addressable_data(0))
    return _digest(leaf)


@jax.jit
def _digest_in_blocks(leaf: jax.Array) -> jax.Array:
    """Returns the same sum as `_digest`, for CPUs, where XLA sums a whole array element by element.

    A loop that adds blocks elementwise takes 40 % of that time. On a GPU, every block would be a
    kernel launch.
    """
    flat = leaf.ravel()
    blocks, rest = divmod(flat.size, _BLOCK)
    places = jax.lax.iota(jnp.uint32, _BLOCK) * np.uint32(_GOLDEN)

    def add(number: jax.Array, total: jax.Array) -> jax.Array:
        words = _words(jax.lax.dynamic_slice_in_dim(flat, number * _BLOCK, _BLOCK))
        before = number.astype(jnp.uint32) * np.uint32(_BLOCK * _GOLDEN % 2**32)
        return total + _mix(words + (places + before))

    total = jax.lax.fori_loop(0, blocks, add, jnp.zeros(_BLOCK, jnp.uint32))
    last = places[:rest] + np.uint32(blocks * _BLOCK * _GOLDEN % 2**32)
    end = _mix(_words(flat[flat.size - rest :]) + last)
    return jnp.sum(total, dtype=jnp.uint32) + jnp.sum(end, dtype=jnp.uint32)


@jax.jit
def _digest(leaf: jax.Array) -> jax.Array:
    words = _words(leaf)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        steps = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        place = place * np.uint32(size % 2**32) + steps
    return jnp.sum(_mix(words + place * np.uint32(_GOLDEN)), dtype=jnp.uint32)


def _words(leaf: jax.Array) -> jax.Array:
    """Returns the bits of each element as 32-bit words; an element of 64 bits becomes two."""
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    bits = min(8 * leaf.dtype.itemsize, 32)
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}"))
    return words.astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
