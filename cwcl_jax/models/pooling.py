"""Pooling of a sequence of tokens to one vector, independent of padding."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.transformer import Execution, linear

POOLINGS = ("cls", "mean", "last", "max", "mean_sqrt_len", "weightedmean")


def pool(
    tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None, kind: str
) -> Float[Array, "b d"]:
    """Returns one vector per row, pooled over the real tokens as in sentence-transformers.

    Kinds: the first token ("cls"), the last one ("last"), the mean, the largest value of each
    feature ("max"), the sum divided by the square root of the count ("mean_sqrt_len"), or a mean in
    which the n-th token has weight n ("weightedmean"). A row without any real token gives zeros
    (for "cls" and "last" its first token) and finite gradients.
    """
    if kind == "cls":
        return tokens[:, 0]
    if kind not in POOLINGS:
        raise ValueError(f"unknown pooling {kind!r}; choose one of {', '.join(POOLINGS)}")
    if mask is None:
        if kind == "mean":
            return jnp.mean(tokens, axis=1)
        mask = jnp.ones(tokens.shape[:2], bool)
    if kind == "last":
        positions = jnp.arange(mask.shape[1])[None, :]
        last = jnp.max(jnp.where(mask, positions, 0), axis=1)
        return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
    if kind == "max":
        some = jnp.any(mask, axis=1)[:, None]
        highest = jnp.max(jnp.where(mask[:, :, None], tokens, -jnp.inf), axis=1)
        return jnp.where(some, highest, 0.0).astype(tokens.dtype)
    weights = mask.astype(jnp.float32)[:, :, None]
    if kind == "weightedmean":
        weights = weights * jnp.arange(1, mask.shape[1] + 1, dtype=jnp.float32)[None, :, None]
    # `where` instead of a product, so that a non-finite value at a masked position cannot leak in.
    seen = jnp.where(weights > 0, tokens.astype(jnp.float32), 0.0)
    total = jnp.sum(seen * weights if kind == "weightedmean" else seen, axis=1)
    count = jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    divisor = jnp.sqrt(count) if kind == "mean_sqrt_len" else count
    return (total / divisor).astype(tokens.dtype)


def up_to_end(
    tokens: Int[Array, "b s"], mask: Bool[Array, "b s"], end_token: int
) -> Bool[Array, "b s"]:
    """Returns the mask of each row up to its first `end_token` (-1: its highest real id).

    A row without that token is kept whole. CLIP's tokenizers pad with the end token itself, so only
    its first position counts.
    """
    highest = jnp.max(jnp.where(mask, tokens, -1), axis=1, keepdims=True)
    ends = (tokens == (highest if end_token < 0 else end_token)).astype(jnp.int32)
    return mask & (jnp.cumsum(ends, axis=1) - ends == 0)


class AttentionPool(nnx.Module):
    """Attention pooling: each head scores the tokens and averages its own slice of the values."""

    def __init__(self, width: int, heads: int, execution: Execution, *, rngs: nnx.Rngs) -> None:
        if width % heads:
            raise ValueError(f"pooling width {width} is not a multiple of heads {heads}")
        self.score = linear(width, heads, execution, rngs)
        self.value = linear(width, width, execution, rngs)
        self.heads = heads

    def __call__(
        self, tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]
    ) -> Float[Array, "b d"]:
        b, s, d = tokens.shape
        some = jnp.any(mask, axis=1)[:, None, None]
        scores = self.score(tokens).astype(jnp.float32)
        scores = jnp.where(mask[:, :, None] | ~some, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=1)
        values = self.value(tokens).reshape(b, s, self.heads, d // self.heads)
        pooled = jnp.einsum(
            "bsh,bshk->bhk", weights, values.astype(jnp.float32), precision="highest"
        ).reshape(b, d)
        return jnp.where(some[:, 0], pooled, 0.0).astype(tokens.dtype)
