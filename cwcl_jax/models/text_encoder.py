"""What text encoders share: embed, contextualise, norm, pool, and perhaps dense layers.

Padding is never seen.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.dense import dense_layers
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.transformer import Execution, TransformerConfig, apply_blocks, make_blocks


class TextEncoder(nnx.Module):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}; a subclass embeds the tokens."""

    def __init__(
        self,
        config: Any,
        stack: TransformerConfig,
        execution: Execution,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.stack = stack
        self.execution = execution
        self.blocks = self.make_blocks(rngs)
        layers = getattr(config, "dense", "")
        self.dense, self._width = dense_layers(layers, config.width, execution, rngs=rngs)

    def make_blocks(self, rngs: nnx.Rngs) -> nnx.Pytree:
        """The stack's blocks; a family may bring a kind of its own."""
        return make_blocks(self.stack, self.execution, rngs=rngs)

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self._width

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """The blocks' input."""
        raise NotImplementedError

    def contextualise(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """The blocks and, where the family has one, the final norm."""
        return self.finish(self.run(x, mask, key))

    def run(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """The blocks."""
        return self.run_with(mask, x, key)

    def run_with(self, seen: Any, x: Float[Array, "b s d"], key: jax.Array | None) -> jax.Array:
        """The blocks, whose kind reads `seen` in the place of a mask."""
        return apply_blocks(
            self.blocks, x, seen, config=self.stack, execution=self.execution, key=key
        )

    def finish(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """What follows the last block: nothing after post-norm blocks."""
        return x

    def tokens(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """The sequence that pooling reads."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x = self.embed(inputs["tokens"], inputs["mask"], keys[0])
        return self.contextualise(x, inputs["mask"], keys[1])

    def pool(self, tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b f"]:
        """One vector per text."""
        return pool(tokens, mask, self.config.pooling)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        return self.densely(self.pool(self.tokens(inputs, key), inputs["mask"]))

    def densely(self, pooled: Float[Array, "b d"]) -> Float[Array, "b f"]:
        """The dense layers behind the pooling; the identity where there is none."""
        layers: Any = self.dense
        for layer in layers:
            pooled = layer(pooled)
        return pooled


def check_length(length: int, limit: int) -> None:
    """A sequence longer than the position table would silently repeat its last row."""
    if length > limit:
        raise ValueError(
            f"sequences have {length} tokens, the text tower has {limit} positions: lower the "
            f"data's max_tokens, or raise the tower's overrides max_tokens"
        )
