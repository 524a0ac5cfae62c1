"""WavLM: Chen et al. 2021, arXiv 2110.13900. A wav2vec 2.0 with gated relative positions.

Attention scores get a bias for the distance of two frames, from one table for all layers; every
layer gates it by the query's input (section 3.2).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.relative import attend_pairs, distance_buckets
from cwcl_jax.models.transformer import (
    Attention,
    Block,
    Execution,
    TransformerConfig,
    apply_blocks,
    embedding,
    linear,
    make_blocks,
)
from cwcl_jax.models.wav2vec2 import (
    IGNORE,
    LARGE,
    LAYER,
    NAMES,
    OURS,
    RULES,
    Wav2Vec2,
    Wav2Vec2Config,
    layout,
    read_extractor,
    read_waves,
)
from cwcl_jax.weights.rules import Rule


@dataclasses.dataclass(frozen=True)
class WavLmConfig(Wav2Vec2Config):
    """Sizes and numerics of a WavLM."""

    buckets: int = 320
    """Number of rows of the table of distances, half of them for earlier frames."""
    max_distance: int = 800
    """Distance in frames from which all distances share a row."""


# arXiv 2110.13900, section 4.1. The base models were trained on unnormalised samples.
PRESETS = {
    "WavLM-base": WavLmConfig(normalize_waveform=False),
    "WavLM-large": WavLmConfig(conv_norm="layer", stable_norm=True, **LARGE),
}


class GatedAttention(Attention):
    """Self-attention whose scores get a bias by distance, gated by each query's own input."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        self.gate = linear(config.width // config.heads, 8, execution, rngs)
        self.gate_constant = nnx.Param(jnp.ones((config.heads,), execution.param_dtype))

    def __call__(self, x: Float[Array, "b s d"], mask: Any) -> Float[Array, "b s d"]:
        real, bias = mask
        b, s, d = x.shape
        parts = x.reshape(b, s, self.heads, d // self.heads)
        gates = self.gate(parts).astype(jnp.float32).reshape(b, s, self.heads, 2, 4)
        gates = jax.nn.sigmoid(jnp.sum(gates, axis=-1))
        constant = self.gate_constant[...].astype(jnp.float32)[None, None]
        gate = gates[..., 0] * (gates[..., 1] * constant - 1.0) + 2.0
        scores = jnp.transpose(gate, (0, 2, 1))[..., None] * bias[None]
        query, key, value = (
            part(x).reshape(b, s, self.heads, -1) for part in (self.query, self.key, self.value)
        )
        mixed = attend_pairs(query, key, value, real, bias=scores.astype(x.dtype))
        return self.out(mixed.reshape(b, s, d))


class GatedBlock(Block):
    """A block with gated attention; its mask is the real frames and the bias (h, s, s)."""

    def __init__(self, config: TransformerConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, execution, rngs=rngs)
        self.attention = GatedAttention(config, execution, rngs=rngs)


class WavLm(Wav2Vec2):
    """Encoder of {"waveform": int16 (b, n) at 16 kHz, "length": int32 (b,)}."""

    def make_blocks(self, rngs: nnx.Rngs) -> nnx.Pytree:
        """Returns the transformer's layers, and creates the table that they share."""
        config = self.config
        if self.execution.attention == "cudnn":
            raise ValueError("WavLM's attention has a bias, which attention='cudnn' does not take")
        self.distances = embedding(config.buckets, config.heads, self.execution, rngs)
        return make_blocks(self.stack, self.execution, rngs=rngs, kind=GatedBlock)

    def contextualise(
        self, x: Float[Array, "b t d"], frames: Bool[Array, "b t"], key: jax.Array | None
    ) -> Float[Array, "b t d"]:
        """Returns the result of the blocks."""
        config = self.config
        rows = distance_buckets(x.shape[1], config.buckets, config.max_distance)
        bias = jnp.transpose(self.distances(jnp.asarray(rows)), (2, 0, 1))
        return apply_blocks(
            self.blocks, x, (frames, bias), config=self.stack, execution=self.execution, key=key
        )


_FILES = dataclasses.replace(
    layout("WavLM", "wavlm"),
    # wav2vec 2.0 has no gates.
    signature=r"(wavlm[./])?encoder[./]layers[./]0[./]attention[./]gru_rel_pos_const",
    rules=[
        Rule(rf"{LAYER}/attention/gru_rel_pos_const", rf"{OURS}/attention/gate_constant", "flat"),
        Rule(rf"{LAYER}/attention/gru_rel_pos_linear/(kernel|bias)", rf"{OURS}/attention/gate/\2"),
        Rule(r"encoder/layers/0/attention/rel_attn_embed/embedding", "encoder/distances/embedding"),
        *RULES,
    ],
    ignore=IGNORE,
)

_NAMES = {**NAMES, "buckets": "num_buckets", "max_distance": "max_bucket_distance"}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    return read_waves(content, _NAMES) if content.get("model_type") == "wavlm" else {}


WAVLM = EncoderFamily(
    WavLmConfig,
    WavLm,
    "speech",
    PRESETS,
    [_FILES],
    _read_config,
    read_processor=read_extractor,
    model_types=("wavlm",),
)
