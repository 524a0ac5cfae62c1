"""BERT (Devlin et al. 2019, arXiv 1810.04805) and RoBERTa (Liu et al. 2019, arXiv 1907.11692).

Both have the same encoder: post-norm blocks, erf GELU, a norm after the embeddings. RoBERTa and
XLM-R count positions over the real tokens, from the padding id + 1, and use one token type. MiniLM
and other sentence encoders are BERTs (or RoBERTas) with mean pooling.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.pooling import POOLINGS
from cwcl_jax.models.text_encoder import TextEncoder, check_length
from cwcl_jax.models.transformer import (
    Execution,
    TransformerConfig,
    embedding,
    layer_norm,
    linear,
)
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes and numerics of a BERT."""

    vocab_size: int = 30522
    max_tokens: int = 512
    token_types: int = 2
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_erf"
    epsilon: float = 1e-12
    dropout: float = 0.1
    pooling: str = "cls"
    """"cls", "mean" and the others of `models.pooling`, or "pooler": BERT's own dense layer and
    tanh on top of "cls"."""
    dense: str = ""
    """Dense layers after the pooling; see `models.dense`."""

    position_offset: int = 0
    """Number of rows of the position table before that of the first real token."""

    @property
    def position_rows(self) -> int:
        """Number of rows of the position table."""
        return self.max_tokens + self.position_offset


@dataclasses.dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes and numerics of a RoBERTa or XLM-R."""

    vocab_size: int = 50265
    token_types: int = 1
    epsilon: float = 1e-5
    pooling: str = "mean"

    position_offset: int = 2  # the padding id, usually 1, plus one


# Sizes: arXiv 1810.04805 section 3; MiniLM: arXiv 2002.10957 and the sentence-transformers models
# all-MiniLM-L6-v2 and all-MiniLM-L12-v2.
PRESETS: dict[str, BertConfig] = {
    "BERT-base": BertConfig(),
    "BERT-base-cased": BertConfig(vocab_size=28996),
    "BERT-large": BertConfig(width=1024, depth=24, heads=16, mlp_width=4096),
    "MiniLM-L6": BertConfig(width=384, depth=6, heads=12, mlp_width=1536, pooling="mean"),
    "MiniLM-L12": BertConfig(width=384, depth=12, heads=12, mlp_width=1536, pooling="mean"),
    "tiny": BertConfig(
        vocab_size=2048, max_tokens=32, width=64, depth=2, heads=2, mlp_width=128, dropout=0.0
    ),
}

# Sizes: arXiv 1907.11692 section 2 (BERT's); XLM-R: arXiv 1911.02116; 6 layers: distilroberta, the
# base of the sentence encoder all-distilroberta-v1.
ROBERTA_PRESETS: dict[str, RobertaConfig] = {
    "RoBERTa-base": RobertaConfig(),
    "RoBERTa-large": RobertaConfig(width=1024, depth=24, heads=16, mlp_width=4096),
    "DistilRoBERTa": RobertaConfig(depth=6),
    "XLM-R-base": RobertaConfig(vocab_size=250002),
    "XLM-R-large": RobertaConfig(vocab_size=250002, width=1024, depth=24, heads=16, mlp_width=4096),
    "tiny": RobertaConfig(
        vocab_size=2048, max_tokens=32, width=64, depth=2, heads=2, mlp_width=128, dropout=0.0
    ),
}


class Bert(TextEncoder):
    """BERT or RoBERTa, depending on the settings."""

    def __init__(self, config: BertConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        if config.pooling not in ("pooler", *POOLINGS):
            raise ValueError(
                f"pooling of a BERT is 'pooler', {', '.join(map(repr, POOLINGS))}, not "
                f"{config.pooling!r}"
            )
        stack = TransformerConfig.of(config, norm_order="post")
        super().__init__(config, stack, execution, rngs=rngs)
        width = config.width
        self.token_embedding = embedding(config.vocab_size, width, execution, rngs)
        self.position_embedding = embedding(config.position_rows, width, execution, rngs)
        self.type_embedding = embedding(config.token_types, width, execution, rngs)
        self.embedding_norm = layer_norm(width, config.epsilon, execution, rngs)
        if config.pooling == "pooler":
            self.pooler = linear(width, width, execution, rngs)

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the sum of token, position and (first) type embeddings, normalised."""
        check_length(tokens.shape[1], self.config.max_tokens)
        offset = self.config.position_offset
        if offset:
            positions = self.position_embedding(counted_positions(mask, offset))
        else:
            positions = self.position_embedding.first(tokens.shape[1])
        kind = self.type_embedding.first(1)
        x = self.embedding_norm(self.token_embedding(tokens) + kind + positions)
        return dropout(x, self.config.dropout, key)

    def pool(self, tokens: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b f"]:
        """Returns one vector per text."""
        if self.config.pooling == "pooler":
            return jnp.tanh(self.pooler(tokens[:, 0]))
        return super().pool(tokens, mask)


def counted_positions(mask: Bool[Array, "b s"], offset: int) -> Int[Array, "b s"]:
    """Returns positions that count the real tokens from `offset`; padding has `offset` - 1."""
    real = mask.astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + offset - 1


# Names in BERT and RoBERTa files, as transformers (PyTorch or Flax) writes them.
_OURS = r"encoder/blocks/\1"
_B = r"encoder/layer/(\d+)"

_BERT_RULES = [
    Rule(r"embeddings/word_embeddings/embedding", "encoder/token_embedding/embedding"),
    Rule(r"embeddings/position_embeddings/embedding", "encoder/position_embedding/embedding"),
    Rule(r"embeddings/token_type_embeddings/embedding", "encoder/type_embedding/embedding"),
    Rule(r"embeddings/LayerNorm/(scale|bias)", r"encoder/embedding_norm/\1"),
    Rule(rf"{_B}/attention/self/(query|key|value)/(kernel|bias)", rf"{_OURS}/attention/\2/\3"),
    Rule(rf"{_B}/attention/output/dense/(kernel|bias)", rf"{_OURS}/attention/out/\2"),
    Rule(rf"{_B}/attention/output/LayerNorm/(scale|bias)", rf"{_OURS}/norm1/\2"),
    Rule(rf"{_B}/intermediate/dense/(kernel|bias)", rf"{_OURS}/mlp/up/\2"),
    Rule(rf"{_B}/output/dense/(kernel|bias)", rf"{_OURS}/mlp/down/\2"),
    Rule(rf"{_B}/output/LayerNorm/(scale|bias)", rf"{_OURS}/norm2/\2"),
    Rule(r"pooler/dense/(kernel|bias)", r"encoder/pooler/\1", optional=True),
]
_BERT_SIGNATURE = r"embeddings[./]token_type_embeddings[./](weight|embedding)"
# Buffers of older files, and heads for other tasks.
_BERT_IGNORE = [r"embeddings/position_ids", r"(cls|lm_head|classifier|qa_outputs)/.*"]


def _bert_view(weights: Weights) -> Weights:
    return without_prefix(flax_names(weights), "(?:bert|roberta)/")


_BERT_FILES = Layout(
    name="BERT",
    signature=rf"(bert[./])?{_BERT_SIGNATURE}",
    rules=_BERT_RULES,
    ignore=_BERT_IGNORE,
    view=_bert_view,
)
_ROBERTA_FILES = Layout(
    name="RoBERTa",
    signature=rf"(roberta[./])?{_BERT_SIGNATURE}",
    rules=_BERT_RULES,
    ignore=_BERT_IGNORE,
    view=_bert_view,
)

_NAMES = {
    **STACK,
    "vocab_size": "vocab_size",
    "token_types": "type_vocab_size",
    "max_tokens": "max_position_embeddings",
}


_ROBERTAS = ("roberta", "xlm-roberta", "camembert")


def _read_bert(content: Mapping[str, Any]) -> dict[str, Any]:
    return named(content, _NAMES) if content.get("model_type", "bert") == "bert" else {}


def _read_roberta(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("model_type", "roberta") not in _ROBERTAS:
        return {}
    settings = named(content, _NAMES)
    padding = content.get("pad_token_id", 1)
    if not isinstance(padding, int):
        raise ValueError(f"pad_token_id is {padding!r}, from which positions are counted")
    settings["position_offset"] = padding + 1
    if "max_tokens" in settings:
        settings["max_tokens"] -= settings["position_offset"]
    return settings


BERT = EncoderFamily(
    BertConfig, Bert, "text", PRESETS, [_BERT_FILES], _read_bert, model_types=("bert",)
)
ROBERTA = EncoderFamily(
    RobertaConfig,
    Bert,
    "text",
    ROBERTA_PRESETS,
    [_ROBERTA_FILES],
    _read_roberta,
    model_types=_ROBERTAS,
)
