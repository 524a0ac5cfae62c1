"""The block of DINOv2 and DINOv3: branches scaled by learned vectors, optionally a gated MLP.

LayerScale: Touvron et al. 2021, arXiv 2103.17239.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.attention import attend
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.relative import turned
from cwcl_jax.models.transformer import (
    Attention,
    Block,
    Execution,
    GatedMlp,
    Mlp,
    TransformerConfig,
    layer_norm,
)


@dataclasses.dataclass(frozen=True)
class ScaledStack(TransformerConfig):
    """The settings of a stack of such blocks."""

    gated: bool = False
    """Use down(activation(gate(x)) * up(x)) instead of down(activation(up(x)))."""
    turn: tuple[int, float] | None = None
    """Patches per side and base of rotary positions; None if positions are added before."""


def patch_angles(side: int, size: int, base: float) -> Float[Array, "s k"]:
    """Returns the rotary angles of `side`^2 patches, for attention heads of width `size`.

    The first `size` / 4 angles of a patch encode its row, the next `size` / 4 its column; the
    second half repeats the first. Patch centres lie between -1 and 1 at any picture size (DINOv3,
    arXiv 2508.10104).
    """
    periods = base ** (jnp.arange(size // 4, dtype=jnp.float32) * 4 / size)
    centres = 2 * (jnp.arange(side, dtype=jnp.float32) + 0.5) / side - 1
    turns = 2 * jnp.pi * centres[:, None] / periods[None, :]
    shape = (side, side, turns.shape[1])
    rows = jnp.broadcast_to(turns[:, None], shape)
    columns = jnp.broadcast_to(turns[None, :], shape)
    half = jnp.concatenate([rows, columns], axis=-1).reshape(side * side, -1)
    return jnp.concatenate([half, half], axis=-1)


class TurnedAttention(Attention):
    """Self-attention with rotary positions for the queries and keys of patches."""

    def __init__(self, config: ScaledStack, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        self.turn = config.turn

    def __call__(self, x: Float[Array, "b s d"], mask: Any) -> Float[Array, "b s d"]:
        if self.turn is None:
            return super().__call__(x, mask)
        b, s, d = x.shape
        side, base = self.turn
        angles = patch_angles(side, d // self.heads, base)
        query, key, value = (
            part(x).reshape(b, s, self.heads, -1) for part in (self.query, self.key, self.value)
        )
        mixed = attend(
            turned(query, angles),
            turned(key, angles),
            value,
            mask,
            causal=False,
            implementation=self.implementation,
        )
        return self.out(mixed.reshape(b, s, d))


class ScaledBlock(Block):
    """Computes x + scale1 * attention(norm1(x)), then x + scale2 * mlp(norm2(x))."""

    def __init__(self, config: ScaledStack, execution: Execution, *, rngs: nnx.Rngs) -> None:
        ones = jnp.ones((config.width,), execution.param_dtype)
        self.attention = TurnedAttention(config, execution, rngs=rngs)
        self.norm1 = layer_norm(config.width, config.epsilon, execution, rngs)
        self.scale1 = nnx.Param(ones)
        self.mlp = (GatedMlp if config.gated else Mlp)(config, execution, rngs=rngs)
        self.norm2 = layer_norm(config.width, config.epsilon, execution, rngs)
        self.scale2 = nnx.Param(ones)
        self.dropout = config.dropout

    def __call__(
        self, x: Float[Array, "b s d"], mask: Any, key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        drop = functools.partial(dropout, rate=self.dropout)
        scale1, scale2 = (p[...][None, None].astype(x.dtype) for p in (self.scale1, self.scale2))
        x = x + drop(self.attention(self.norm1(x), mask) * scale1, key=keys[0])
        return x + drop(self.mlp(self.norm2(x)) * scale2, key=keys[1])
