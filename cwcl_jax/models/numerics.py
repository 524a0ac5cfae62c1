"""Small numerical functions that every encoder shares, with explicit numerics.

GELU exists in two forms that differ by up to 4.7e-4, which is enough to spoil an imported tower.
Activations are therefore always named by their exact form.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = ("gelu_erf", "gelu_tanh", "quick_gelu", "relu", "silu")


def activate(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """Returns x after the activation `name`, one of `ACTIVATIONS`."""
    if name == "gelu_erf":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "relu":
        return jax.nn.relu(x)
    if name == "silu":
        return jax.nn.silu(x)
    raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")


def l2_normalize(x: Float[Array, "... d"], *, epsilon: float = 1e-12) -> Float[Array, "... d"]:
    """Returns unit vectors in float32. A zero vector stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def dropout(
    x: Float[Array, "*shape"], rate: float, key: jax.Array | None
) -> Float[Array, "*shape"]:
    """Returns x after inverted dropout; x itself without a key or with rate 0."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
