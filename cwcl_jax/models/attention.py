"""Scaled dot-product attention: XLA's everywhere, cuDNN's fused kernel where possible.

`jax.nn.dot_product_attention` uses XLA unless cuDNN is requested by name. cuDNN supports only
half-precision dtypes, head sizes in multiples of 8, masks of full size and, for training, even
sequence lengths (a ViT has 197 tokens). Odd lengths are therefore padded by one token that is
masked. Softmax is in float32 in both.
"""

import functools

import jax
import jax.numpy as jnp
from absl import logging
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
    """Returns self-attention; `mask` is True for real keys.

    `implementation` is "auto", "xla" or "cudnn".
    """
    if implementation == "auto":
        implementation = choice(query.shape[1:], query.dtype, mask is not None, causal)
    return _attention(query, key, value, mask, causal, implementation)


def choice(shape: tuple[int, ...], dtype: DTypeLike, masked: bool, causal: bool) -> str:
    """Returns the implementation that "auto" selects: "cudnn" or "xla".

    If a GPU could have the kernel but refuses it, the reason is logged once as a warning.

    Args:
      shape: tokens, heads and head size.
    """
    if jax.default_backend() != "gpu" or not cudnn_takes(dtype, shape[-1]):
        return "xla"
    return "xla" if _cudnn_refuses(tuple(shape), jnp.dtype(dtype), masked, causal) else "cudnn"


def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    implementation: str,
) -> jax.Array:
    size = query.shape[1]
    if implementation == "cudnn" and size % 2:
        mask = jnp.ones((1, size), bool) if mask is None else mask
        return _with_a_blind_token(query, key, value, mask, causal, implementation)
    if mask is not None:
        # A row without any real key would divide by zero in a fused kernel. Such a row may attend
        # to everything, because pooling drops it.
        mask = mask | ~jnp.any(mask, axis=1, keepdims=True)
        mask = mask[:, None, None, :]
        if implementation == "cudnn":
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
    """Returns the same attention, computed with one additional token that is masked."""
    query, key, value = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value))
    mask = jnp.pad(mask, ((0, 0), (0, 1)))
    return _attention(query, key, value, mask, causal, implementation)[:, :-1]


def cudnn_takes(dtype: DTypeLike, head_dim: int) -> bool:
    """Returns whether cuDNN supports a dtype and head size, known without a device."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and head_dim % 8 == 0 and head_dim <= 128


@functools.cache
def _cudnn_refuses(shape: tuple[int, ...], dtype: jnp.dtype, masked: bool, causal: bool) -> str:
    """Returns why this device and driver lack the kernel, or ""; a refusal is logged as a warning.

    The kernel is compiled, forward and backward, so that an older GPU, another vendor's GPU or a
    missing cuDNN is detected here and not in the training step.
    """

    def loss(x: jax.Array, mask: jax.Array | None) -> jax.Array:
        return jnp.sum(_attention(x, x, x, mask, causal, "cudnn").astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, *shape), dtype)
    mask = jax.ShapeDtypeStruct((1, shape[0]), jnp.bool_) if masked else None
    try:
        jax.jit(jax.grad(loss)).lower(x, mask).compile()
    # JAX raises NotImplementedError, ValueError or (without cuDNN) RuntimeError, of which compiler
    # and driver errors are subclasses. Any other exception is a bug of ours.
    except (NotImplementedError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logging.warning(
            "attention of %d tokens, %d heads of %d runs in XLA, not in cuDNN's fused kernel, "
            "which cannot run here: %s", *shape, reason,
        )  # fmt: skip
        return reason
    return ""
