"""The encoder of BART: Lewis et al. 2020, arXiv 1910.13461. Post-norm blocks like BERT's.

BART's position table starts with two unused rows, which the import drops; there are no token types.
Features are the mean over the real tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layer_names import layer_rules
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.text_encoder import TextEncoder, check_length
from cwcl_jax.models.transformer import Execution, TransformerConfig, embedding, layer_norm
from cwcl_jax.weights.config_json import ENCODER_STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class BartConfig:
    """Sizes and numerics of a BART encoder."""

    vocab_size: int = 50265
    max_tokens: int = 1024
    width: int = 768
    depth: int = 6
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    dropout: float = 0.1
    scale_embedding: bool = False
    pooling: str = "mean"
    """"mean", "cls" or "last"."""


# arXiv 1910.13461 section 2.1 and appendix: six layers of BERT-base's width, twelve of
# BERT-large's.
PRESETS: dict[str, BartConfig] = {
    "BART-base": BartConfig(),
    "BART-large": BartConfig(width=1024, depth=12, heads=16, mlp_width=4096),
    "tiny": BartConfig(
        vocab_size=2048, max_tokens=32, width=64, depth=2, heads=2, mlp_width=128, dropout=0.0
    ),
}


class BartEncoder(TextEncoder):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: BartConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        stack = TransformerConfig.of(config, norm_order="post")
        super().__init__(config, stack, execution, rngs=rngs)
        self.token_embedding = embedding(config.vocab_size, config.width, execution, rngs)
        self.position_embedding = embedding(config.max_tokens, config.width, execution, rngs)
        self.embedding_norm = layer_norm(config.width, config.epsilon, execution, rngs)

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the sum of token and position embeddings, normalised."""
        check_length(tokens.shape[1], self.config.max_tokens)
        x = self.token_embedding(tokens)
        if self.config.scale_embedding:
            x = x * self.config.width**0.5
        x = self.embedding_norm(x + self.position_embedding.first(tokens.shape[1]))
        return dropout(x, self.config.dropout, key)


# Names in BART files, as transformers (PyTorch or Flax) writes them.
_L = r"encoder/layers/(\d+)"


def _bart_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "model/")


_FILES = Layout(
    name="BART",
    signature=r"(model[./])?encoder[./]layernorm_embedding[./](weight|scale)",
    view=_bart_view,
    rules=[
        # The table is stored once for encoder and decoder, by some writers under both names.
        Rule(r"(?:shared|encoder/embed_tokens)/embedding", "encoder/token_embedding/embedding"),
        Rule(
            r"encoder/embed_positions/embedding",
            "encoder/position_embedding/embedding",
            "drop_two_rows",
        ),
        Rule(r"encoder/layernorm_embedding/(scale|bias)", r"encoder/embedding_norm/\1"),
        *layer_rules(_L),
    ],
    ignore=[r"(decoder|lm_head|classification_head|qa_outputs)/.*", r"final_logits_bias"],
)

_NAMES = {
    **ENCODER_STACK,
    "vocab_size": "vocab_size",
    "max_tokens": "max_position_embeddings",
    "scale_embedding": "scale_embedding",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    return named(content, _NAMES) if content.get("model_type", "bart") == "bart" else {}


BART = EncoderFamily(
    BartConfig, BartEncoder, "text", PRESETS, [_FILES], _read_config, model_types=("bart",)
)
