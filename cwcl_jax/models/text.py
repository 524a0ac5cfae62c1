"""Text transformer from scratch: pre-norm, learned positions (CLIP's text tower when causal).

Radford et al. 2021, arXiv 2103.00020, section 2.4. By default every token attends to every other,
and features are the mean over the real tokens, which needs no special token of the tokenizer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models import clip_layouts, open_clip
from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.pooling import pool, up_to_end
from cwcl_jax.models.text_encoder import TextEncoder, check_length
from cwcl_jax.models.transformer import Execution, TransformerConfig, embedding, layer_norm
from cwcl_jax.weights.config_json import STACK, clip_part, named


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
    """"mean", "last" (the last real token, as CLIP with an end token), "cls" (the first) or "end":
    the first `end_token`, whatever the mask says of what follows it, as in CLIP's files."""
    causal: bool = False
    end_token: int = -1
    """The id that pooling="end" looks for; -1 is the highest id of each text, as in CLIP."""


PRESETS: dict[str, TextConfig] = {
    # This package's own size for short captions and a small vocabulary.
    "tiny": TextConfig(vocab_size=2048, max_tokens=32, width=128, depth=2, heads=4, mlp_width=512),
    # S and B: the ViT's sizes of the same name, as LiT pairs its towers (arXiv 2111.07991, 4.1).
    "S": TextConfig(width=384, depth=12, heads=6, mlp_width=1536),
    "B": TextConfig(width=768, depth=12, heads=12, mlp_width=3072),
}
# CLIP's text towers for ViT-B and ViT-L (arXiv 2103.00020, section 2.4 and table 20).
PRESETS["CLIP-B"] = TextConfig(
    vocab_size=49408, causal=True, pooling="last", activation="quick_gelu", epsilon=1e-5
)
PRESETS["CLIP-L"] = dataclasses.replace(PRESETS["CLIP-B"], width=768, heads=12, mlp_width=3072)


class TextTransformer(TextEncoder):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: TextConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        stack = TransformerConfig.of(config, norm_order="pre", causal=config.causal)
        super().__init__(config, stack, execution, rngs=rngs)
        self.token_embedding = embedding(config.vocab_size, config.width, execution, rngs)
        self.position_embedding = embedding(config.max_tokens, config.width, execution, rngs)
        self.norm = layer_norm(config.width, config.epsilon, execution, rngs)

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the sum of token and position embeddings."""
        check_length(tokens.shape[1], self.config.max_tokens)
        x = self.token_embedding(tokens) + self.position_embedding.first(tokens.shape[1])
        return dropout(x.astype(self.execution.dtype), self.config.dropout, key)

    def finish(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Returns the result of the final norm of pre-norm blocks."""
        return self.norm(x)

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        if self.config.pooling != "end":
            return super().__call__(inputs, key)
        mask = up_to_end(inputs["tokens"], inputs["mask"], self.config.end_token)
        return self.densely(pool(self.tokens(inputs, key), mask, "last"))


_NAMES = {
    **STACK,
    "vocab_size": "vocab_size",
    "max_tokens": "max_position_embeddings",
    "end_token": "eos_token_id",
}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if "model_cfg" in content:
        return open_clip.read_text(content)
    part = clip_part(content, "text")
    if part is None:
        return named(content, _NAMES) if content.get("model_type", "text") == "text" else {}
    usual = dataclasses.asdict(PRESETS["CLIP-B"])  # transformers' default size
    settings = usual | {"pooling": "end", "end_token": usual["vocab_size"] - 1}
    settings |= named(part, _NAMES)
    if settings["end_token"] == 2:
        # Marks files from before the id was stored: CLIP's end token is the highest id.
        settings["end_token"] = -1
    return settings


TEXT = EncoderFamily(
    TextConfig,
    TextTransformer,
    "text",
    PRESETS,
    [clip_layouts.TEXT, open_clip.TEXT],
    _read_config,
    model_types=("clip", "clip_text_model"),
)
