"""What text encoders share: embed, contextualise, norm, pool, and optional dense layers.

Padding never affects the result.
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
        """Returns the stack's blocks; a family may use its own kind."""
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
        """Returns the input of the blocks."""
        raise NotImplementedError

    def contextualise(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the result of the blocks and, if the family has one, of the final norm."""
        return self.finish(self.run(x, mask, key))

    def run(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the result of the blocks."""
        return self.run_with(mask, x, key)

    def run_with(self, seen: Any, x: Float[Array, "b s d"], key: jax.Array | None) -> jax.Array:
        """Returns the result of the blocks, which read `seen` instead of a mask."""
        return apply_blocks(
            self.blocks, x, seen, config=self.stack, execution=self.execution, key=key
        )

    def finish(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Returns the result of what follows the last block: nothing for post-norm blocks."""
        return x

    def tokens(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the sequence that pooling reads."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        x = self.embed(inputs["tokens"], inputs["mask"], keys[0])
        return self.contextualise(x, inputs["mask"], keys[1])

    def pool(self, tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b f"]:
        """Returns one vector per text."""
        return pool(tokens, mask, self.config.pooling)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        return self.densely(self.pool(self.tokens(inputs, key), inputs["mask"]))

    def densely(self, pooled: Float[Array, "b d"]) -> Float[Array, "b f"]:
        """Returns the result of the dense layers after the pooling; the input if there are none."""
        layers: Any = self.dense
        for layer in layers:
            pooled = layer(pooled)
        return pooled


def check_length(length: int, limit: int) -> None:
    """Raises ValueError if a sequence is longer than the position table.

    Otherwise its last row would silently be repeated.
    """
    if length > limit:
        raise ValueError(
            f"sequences have {length} tokens, the text tower has {limit} positions: lower the "
            f"data's max_tokens, or raise the tower's overrides max_tokens"
        )
