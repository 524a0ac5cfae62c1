"""The checksum of a leaf: the equation in NumPy, the same on every mesh, every change found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cwcl_jax.training.digest import _digest, digests


def by_hand(array):
    """The module's equation with Python's integers."""
    total = 0
    bits = np.ascontiguousarray(array).view(f"u{min(array.itemsize, 4)}").ravel()
    for place, word in enumerate(bits.tolist()):
        word = (word + place * 0x9E3779B9) % 2**32
        word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
        word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
        total += word ^ (word >> 16)
    return total % 2**32


def noise(shape, dtype):
    return (100 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", jnp.bfloat16, "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 2)])
def test_it_is_the_equation(shape, dtype):
    array = noise(shape, dtype)
    assert digests({"leaf": jnp.asarray(array)}) == {"leaf": by_hand(array)}


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (("x", "y"),), ()])
def test_it_does_not_depend_on_the_layout(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = noise((8, 6), np.float32)
    there = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digests({"leaf": there}) == {"leaf": by_hand(array)}


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "uint8"])
def test_blocks_and_what_is_left_of_them_give_the_same(dtype):
    """On a CPU a leaf is read in blocks; spread over devices it is not."""
    array = noise((3, 5000), dtype)
    assert digests({"leaf": jnp.asarray(array)}) == {"leaf": int(_digest(jnp.asarray(array)))}
    assert digests({"leaf": jnp.asarray(array)}) == {"leaf": by_hand(array)}


def test_every_flipped_bit_is_found():
    array = noise((4, 3), np.float32)
    before = by_hand(array)
    for byte in range(array.nbytes):
        for bit in range(8):
            changed = array.copy()
            changed.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            assert by_hand(changed) != before


def test_order_and_zeroed_blocks_are_found():
    array = noise((64, 16), np.float32)
    zeroed, swapped = array.copy(), array[::-1].copy()
    zeroed[8:16] = 0
    found = [digests({"leaf": jnp.asarray(one)})["leaf"] for one in (array, zeroed, swapped)]
    assert len(set(found)) == 3
