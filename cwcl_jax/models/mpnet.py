"""MPNet (Song et al. 2020, arXiv 2004.09297), the base of all-mpnet-base-v2.

BERT's post-norm blocks, without token types. Positions count the real tokens from 2, and one table
of biases by distance, shared by all layers, enters every attention.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.bert import counted_positions
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.relative import attend_pairs, distance_buckets, refuse_scan
from cwcl_jax.models.text_encoder import TextEncoder, check_length
from cwcl_jax.models.transformer import (
    Attention,
    Block,
    Execution,
    TransformerConfig,
    embedding,
    layer_norm,
    make_blocks,
)
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix

# Larger distances share the last bucket; the files do not store this number.
_FARTHEST = 128


@dataclasses.dataclass(frozen=True)
class MpnetConfig:
    """Sizes and numerics of an MPNet."""

    vocab_size: int = 30527
    max_tokens: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    dropout: float = 0.1
    pooling: str = "mean"
    """"mean", "cls" and the others of `models.pooling`."""
    dense: str = ""
    """Dense layers after the pooling; see `models.dense`."""
    position_offset: int = 2
    """Number of rows of the position table before that of the first real token."""
    buckets: int = 32
    """Number of rows of the table of biases: half for each direction."""

    @property
    def position_rows(self) -> int:
        """Number of rows of the position table."""
        return self.max_tokens + self.position_offset


# arXiv 2004.09297 section 3.1: BERT-base's sizes.
PRESETS: dict[str, MpnetConfig] = {
    "MPNet-base": MpnetConfig(),
    "tiny": MpnetConfig(
        vocab_size=2048, max_tokens=32, width=64, depth=2, heads=2, mlp_width=128, dropout=0.0
    ),
}


class BiasedAttention(Attention):
    """Self-attention with a bias for each pair of positions; its mask is the pair (mask, bias)."""

    def __call__(self, x: Float[Array, "b s d"], mask: Any) -> Float[Array, "b s d"]:
        real, bias = mask
        b, s, d = x.shape
        query, key, value = (
            part(x).reshape(b, s, self.heads, -1) for part in (self.query, self.key, self.value)
        )
        return self.out(attend_pairs(query, key, value, real, bias=bias).reshape(b, s, d))


class MpnetBlock(Block):
    """BERT's block with biased attention."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        self.attention = BiasedAttention(config, execution, rngs=rngs)


class Mpnet(TextEncoder):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: MpnetConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        refuse_scan("MPNet", execution)
        super().__init__(
            config, TransformerConfig.of(config, norm_order="post"), execution, rngs=rngs
        )
        width = config.width
        self.token_embedding = embedding(config.vocab_size, width, execution, rngs)
        self.position_embedding = embedding(config.position_rows, width, execution, rngs)
        self.embedding_norm = layer_norm(width, config.epsilon, execution, rngs)
        self.distance_bias = embedding(config.buckets, config.heads, execution, rngs)

    def make_blocks(self, rngs: nnx.Rngs) -> nnx.Pytree:
        return make_blocks(self.stack, self.execution, rngs=rngs, kind=MpnetBlock)

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the sum of token and position embeddings, normalised."""
        check_length(tokens.shape[1], self.config.max_tokens)
        places = counted_positions(mask, self.config.position_offset)
        x = self.token_embedding(tokens) + self.position_embedding(places)
        return dropout(self.embedding_norm(x), self.config.dropout, key)

    def run(
        self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"], key: jax.Array | None = None
    ) -> Float[Array, "b s d"]:
        """Returns the result of the blocks, all with the same biases."""
        rows = distance_buckets(x.shape[1], self.config.buckets, _FARTHEST)
        bias = self.distance_bias(jnp.asarray(rows)).transpose(2, 0, 1)[None]
        return self.run_with((mask, bias), x, key)


# Names in MPNet files, as transformers writes them.
_OURS = r"encoder/blocks/\1"
_B = r"encoder/layer/(\d+)"
_PARTS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "mpnet/")


_FILES = Layout(
    name="MPNet",
    signature=r"(mpnet[./])?encoder[./]relative_attention_bias[./](weight|embedding|kernel)",
    view=_view,
    rules=[
        Rule(r"embeddings/word_embeddings/embedding", "encoder/token_embedding/embedding"),
        Rule(r"embeddings/position_embeddings/embedding", "encoder/position_embedding/embedding"),
        Rule(r"embeddings/LayerNorm/(scale|bias)", r"encoder/embedding_norm/\1"),
        # A table whose name does not show that it is one, so its axes arrive transposed.
        Rule(
            r"encoder/relative_attention_bias/kernel", "encoder/distance_bias/embedding", "turned"
        ),
        *(
            Rule(rf"{_B}/attention/attn/{theirs}/(kernel|bias)", rf"{_OURS}/attention/{ours}/\2")
            for theirs, ours in _PARTS.items()
        ),
        Rule(rf"{_B}/attention/LayerNorm/(scale|bias)", rf"{_OURS}/norm1/\2"),
        Rule(rf"{_B}/intermediate/dense/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
        Rule(rf"{_B}/output/dense/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
        Rule(rf"{_B}/output/LayerNorm/(scale|bias)", rf"{_OURS}/norm2/\2"),
    ],
    # A pooler that its sentence encoders do not use, a buffer of older files, and other heads.
    ignore=[r"embeddings/position_ids", r"(pooler|lm_head|classifier|qa_outputs)/.*"],
)

_NAMES = {
    **STACK,
    "vocab_size": "vocab_size",
    "max_tokens": "max_position_embeddings",
    "buckets": "relative_attention_num_buckets",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("model_type", "mpnet") != "mpnet":
        return {}
    settings = named(content, _NAMES)
    if settings.get("buckets", 32) != 32:
        # transformers creates a table of this length but uses only 32 of its rows.
        raise ValueError(
            f"relative_attention_num_buckets is {settings['buckets']}: only 32 is supported"
        )
    if "max_tokens" in settings:
        # The padding id of positions is 1 for every MPNet, whatever pad_token_id is.
        settings["max_tokens"] -= MpnetConfig.position_offset
    return settings


MPNET = EncoderFamily(
    MpnetConfig, Mpnet, "text", PRESETS, [_FILES], _read_config, model_types=("mpnet",)
)
