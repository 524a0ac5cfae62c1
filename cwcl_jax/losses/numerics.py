"""Dtypes and products that every form of the loss shares."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from cwcl_jax.precision import product

Scalar = Float[Array, ""] | float


def wide(x: Array) -> jnp.dtype:
    """Returns the dtype of sums: float64 for float64, float32 for everything narrower."""
    return jnp.promote_types(x.dtype, jnp.float32)


def inner(a: Array, b: Array, precision: str = "highest") -> Array:
    """Returns all inner products of the rows of a and b, accumulated in float32 or wider."""
    return product(a, b, (((1,), (1,)), ((), ())), precision, wide(a))
