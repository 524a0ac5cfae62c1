"""Dense layers, norms and embedding tables whose gradients are summed in float32.

The gradient of a bias, of a table's row or of a kernel is a sum over all rows of a batch, and on a
mesh over its devices. Summed in bfloat16 it stops growing once a term is below half of the last
digit: at 4,096 rows a frequent token kept 60 % of its gradient. Here such sums are in float32,
whatever the compute dtype.

All layers work on matrices, with one row per token. If rows have two axes, XLA for CPUs copies a
kernel's gradient through a transposed array and sums a bias's gradient slowly: a text tower's
backward pass took twice as long (README.md, "Measured").
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def affine(
    x: Float[Array, "*b d"], kernel: Float[Array, "d e"], bias: Float[Array, " e"] | None
) -> Float[Array, "*b e"]:
    """Returns x @ kernel + bias in the dtype of x, to which kernel and bias are rounded.

    If x is narrower than float32, it has first derivatives in reverse mode only.
    """
    return _product(x, kernel, bias) if x.dtype.itemsize >= 4 else _narrow(x, kernel, bias)


def _product(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = _rows(x) @ kernel.astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(x.dtype)[None]
    return y.reshape(*x.shape[:-1], -1)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


_narrow = jax.custom_vjp(_product)


def _narrow_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[Any, Any]:
    return _product(x, kernel, bias), (x, kernel, bias)


def _narrow_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    x, kernel, bias = residuals
    flat, g = _rows(x), _rows(g)
    to_x = lax.dot_general(g, kernel.astype(g.dtype), (((1,), (1,)), ((), ())))
    over_rows = (((0,), (0,)), ((), ()))
    to_kernel = lax.dot_general(flat, g, over_rows, preferred_element_type=jnp.float32)
    to_bias = None
    if bias is not None:
        to_bias = jnp.sum(g, axis=0, dtype=jnp.float32).astype(bias.dtype)
    return to_x.reshape(x.shape), to_kernel.astype(kernel.dtype), to_bias


_narrow.defvjp(_narrow_forward, _narrow_backward)


# Where remat keeps the results of products it keeps the sum of an adapted layer, and not its parts.
ADAPTED = "adapted"


class Linear(nnx.Linear):
    """`nnx.Linear` by `affine`: computed in `dtype`, with gradients summed in float32."""

    def adapt(self, a: Any, b: Any, scale: float) -> None:
        """Makes it x W + scale (x A) B, in which W has no gradient (see `models.lora`)."""
        self.lora_a = nnx.Param(a)
        self.lora_b = nnx.Param(b)
        self.lora_scale = scale

    def __call__(self, inputs: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        x = inputs.astype(self.dtype)
        bias = None if self.bias is None else self.bias[...]
        if not hasattr(self, "lora_a"):
            return affine(x, self.kernel[...], bias)
        y = affine(x, lax.stop_gradient(self.kernel[...]), bias)
        low = affine(x, self.lora_a[...], None)
        return checkpoint_name(y + affine(low, self.lora_scale * self.lora_b[...], None), ADAPTED)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm in float32 with two-pass variance; the result is rounded to `narrow`.

    The fast form of the variance, flax's default, has errors of 4e-4 on data with a large mean.
    """

    def __init__(self, width: int, *, narrow: jnp.dtype, **options: Any) -> None:
        super().__init__(width, dtype=jnp.float32, **options)
        self.narrow = narrow

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        rows = _rows(x).astype(jnp.float32)
        centred = rows - _means(rows)
        y = centred * lax.rsqrt(_means(centred * centred) + self.epsilon)
        if self.scale is not None:
            y = y * self.scale[...].astype(jnp.float32)[None]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[None]
        return y.astype(self.narrow).reshape(x.shape)


def _means(rows: Float[Array, "n d"]) -> Float[Array, "n 1"]:
    """Returns the mean of each row: on CPUs as a product, in half the time of XLA's sum."""
    if jax.default_backend() != "cpu":
        return jnp.mean(rows, axis=1, keepdims=True)
    width = rows.shape[1]
    return rows @ jnp.full((width, 1), 1 / width, rows.dtype)


class Embed(nnx.Embed):
    """A table with float32 rows, so that the caller can add them up and round once."""

    def first(self, count: int) -> Float[Array, "1 s d"]:
        """Returns the table's first rows, in float32, with a leading axis for all examples."""
        return self.embedding[...][None, :count].astype(jnp.float32)
