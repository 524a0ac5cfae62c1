"""Precision of float32 matrix products: one scale of names for towers and losses.

    name        NVIDIA GPU                       TPU                   CPU       relative error
    highest     float32, no tensor cores         six bfloat16 passes   float32   3e-7
    high        three TF32 passes                three                 float32   3e-7, 4e-6
    default     one TF32 pass                    one                   float32   3e-4, 2e-3
    bfloat16    one pass of rounded inputs, sums in float32: everywhere the same 2e-3

Relative errors are those of a product of normal random numbers (BUILD_NOTES.md, "Accelerators").
JAX's own "high" on a GPU is one TF32 pass; here it is `TF32_TF32_F32_X3`. Arrays of narrower dtypes
are not affected.
"""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

PRECISIONS = ("highest", "high", "default")


def require_precision(name: str) -> None:
    """Raises ValueError unless a tower can have this precision."""
    if name not in PRECISIONS:
        raise ValueError(
            f"{name!r} is not one of {', '.join(PRECISIONS)}; bfloat16 is a tower's dtype"
        )


def passes(name: str) -> Any:
    """Returns JAX's name of a precision of float32 products, on the current device."""
    if name == "high" and jax.default_backend() == "gpu":
        return lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.Precision[name.upper()]


def products_at(name: str) -> AbstractContextManager[Any]:
    """Sets the precision of float32 products that specify none of their own, inside a `with`."""
    chosen = passes(name)
    preset = isinstance(chosen, lax.DotAlgorithmPreset)
    return jax.default_matmul_precision(chosen.name if preset else chosen.name.lower())


def product(a: Array, b: Array, dimensions: Any, precision: str, result: Any) -> Array:
    """Returns `lax.dot_general` with the operands and passes of a named precision.

    Args:
      a, b: operands.
      dimensions: `dimension_numbers`.
      precision: one of `PRECISIONS`, or "bfloat16".
      result: dtype of the sums.
    """
    if precision == "bfloat16" and a.dtype == jnp.float32:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    chosen = passes(precision) if a.dtype == jnp.float32 and precision != "bfloat16" else None
    return lax.dot_general(a, b, dimensions, precision=chosen, preferred_element_type=result)
