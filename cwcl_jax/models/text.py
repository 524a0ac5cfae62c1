"""Text transformer from scratch: pre-norm, learned positions (CLIP's text tower when causal).

Radford et al. 2021, arXiv 2103.00020, section 2.4. By default every token sees every other and the
features are the mean over the real tokens, which needs no special token from the tokenizer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.transformer import (
    Execution,
    TransformerConfig,
    apply_blocks,
    embedding,
    layer_norm,
    make_blocks,
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of a text transformer."""

    vocab_size: int = 32000
    max_tokens: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    mlp_width: int = 2048
    activation: str = "gelu_tanh"
    epsilon: float = 1e-6
    dropout: float = 0.0
    pooling: str = "mean"
    """"mean", "last" (the last real token, as CLIP with an end token) or "cls" (the first)."""
    causal: bool = False


PRESETS: dict[str, TextConfig] = {
    # This package's own size for short captions and a small vocabulary.
    "tiny": TextConfig(vocab_size=2048, max_tokens=32, width=128, depth=2, heads=4, mlp_width=512),
    # S and B: the ViT's sizes of the same name, as LiT pairs its towers (arXiv 2111.07991, 4.1).
    "S": TextConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "B": TextConfig(width=768, depth=12, heads=12, mlp_width=3072),
    # CLIP's text tower beside ViT-B (arXiv 2103.00020, section 2.4 and table 20).
    "CLIP-B": TextConfig(
        vocab_size=49408, causal=True, pooling="last", activation="quick_gelu", epsilon=1e-5
    ),
}


class TextTransformer(nnx.Module):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: TextConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.token_embedding = embedding(config.vocab_size, config.width, execution, rngs)
        self.position_embedding = embedding(config.max_tokens, config.width, execution, rngs)
        self.blocks = make_blocks(transformer_config(config), execution, rngs=rngs)
        self.norm = layer_norm(config.width, config.epsilon, execution, rngs)
        self.config = config
        self.execution = execution

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def embed(
        self, tokens: Int[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Token and position embeddings."""
        check_length(tokens.shape[1], self.config.max_tokens)
        positions = self.position_embedding.embedding[...][None, : tokens.shape[1]]
        x = self.token_embedding(tokens) + positions.astype(self.execution.dtype)
        return dropout(x, self.config.dropout, key)

    def tokens(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """The sequence after the final norm."""
        keys = (None, None) if key is None else jax.random.split(key, 2)
        return self.norm(
            self.contextualise(self.embed(inputs["tokens"], keys[0]), inputs["mask"], keys[1])
        )

    def contextualise(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """The blocks alone."""
        config = transformer_config(self.config)
        return apply_blocks(self.blocks, x, mask, config=config, execution=self.execution, key=key)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        return pool(self.tokens(inputs, key), inputs["mask"], self.config.pooling)


def check_length(length: int, limit: int) -> None:
    """A sequence longer than the position table would silently repeat its last row."""
    if length > limit:
        raise ValueError(
            f"sequences have {length} tokens, the text tower has {limit} positions: lower the "
            f"data's max_tokens, or raise the tower's overrides max_tokens"
        )


def transformer_config(config: TextConfig) -> TransformerConfig:
    """The stack of a text transformer."""
    return TransformerConfig(
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        mlp_width=config.mlp_width,
        norm_order="pre",
        activation=config.activation,
        epsilon=config.epsilon,
        dropout=config.dropout,
        causal=config.causal,
    )
