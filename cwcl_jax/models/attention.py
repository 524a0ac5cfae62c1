"""Scaled dot-product attention: XLA's everywhere, cuDNN's fused kernel where it takes the arrays.

`jax.nn.dot_product_attention` chooses XLA unless it is asked for cuDNN by name, and cuDNN takes
half-precision types, head sizes in multiples of 8, masks of full size and, with a mask, even
lengths only; an odd one gets a token that nobody looks at. Softmax is in float32 in both.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "b s h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    mask: Bool[Array, "b s"] | None,
    *,
    causal: bool,
    implementation: str,
) -> Float[Array, "b s h k"]:
    """Self-attention; `mask` is True where a key is real, `implementation` auto, xla or cudnn."""
    if implementation == "auto":
        fits = jax.default_backend() == "gpu" and cudnn_takes(query.dtype, query.shape[-1])
        works = fits and _cudnn_compiles(query.shape, query.dtype, mask is not None, causal)
        implementation = "cudnn" if works else "xla"
    return _attention(query, key, value, mask, causal, implementation)


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    if mask is not None:
        # A row without any real key would divide by zero in a fused kernel; it may look at
        # everything, since pooling drops it.
        mask = mask | ~jnp.any(mask, axis=1, keepdims=True)
        if implementation == "cudnn" and mask.shape[1] % 2:
            return _with_a_blind_token(query, key, value, mask, causal, implementation)
        mask = mask[:, None, None, :]
        if implementation == "cudnn":
            size = query.shape[1]
            mask = jnp.broadcast_to(mask, (mask.shape[0], 1, size, size))
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        implementation=implementation,  # type: ignore[arg-type]
    )


def _with_a_blind_token(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    causal: bool,
    implementation: str,
) -> jax.Array:
    """The same attention, computed with one token more, of which no other sees anything."""
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    mask = jnp.pad(mask, ((0, 0), (0, 1)))
    return _attention(query, key, value, mask, causal, implementation)[:, :-1]


def cudnn_takes(dtype: DTypeLike, head_dim: int) -> bool:
    """What cuDNN asks of type and head size, known without a device."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and head_dim % 8 == 0 and head_dim <= 128


@functools.cache
def _cudnn_compiles(shape: tuple[int, ...], dtype: DTypeLike, masked: bool, causal: bool) -> bool:
    """Whether this device and driver have the kernel: asked by compiling it, forward and back.

    An older GPU, another vendor's, or a missing cuDNN is found here and not in the training step.
    """

    def loss(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return jnp.sum(_attention(x, x, x, mask, causal, "cudnn").astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, *shape[1:]), dtype)
    mask = jax.ShapeDtypeStruct((1, shape[1]), jnp.bool_) if masked else None
    try:
        jax.jit(jax.grad(loss)).lower(x, mask).compile()
    except Exception:
        return False
    return True
