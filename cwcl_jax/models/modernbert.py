"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): a BERT with rotary positions and gated MLPs.

Pre-norm blocks without biases; every third layer attends to all tokens, the others to a window,
each kind with its own theta. The first block's input is already normalised and not normalised
again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.layers import LayerNorm
from cwcl_jax.models.numerics import dropout
from cwcl_jax.models.relative import attend_pairs, refuse_scan, turned
from cwcl_jax.models.text_encoder import TextEncoder, check_length
from cwcl_jax.models.transformer import (
    Execution,
    GatedMlp,
    TransformerConfig,
    embedding,
    linear,
)
from cwcl_jax.weights.config_json import STACK, named
from cwcl_jax.weights.readers import Weights
from cwcl_jax.weights.rules import Layout, Rule
from cwcl_jax.weights.views import apart, flax_names, without_prefix


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Sizes and numerics of a ModernBERT."""

    vocab_size: int = 50368
    max_tokens: int = 8192
    width: int = 768
    depth: int = 22
    heads: int = 12
    mlp_width: int = 1152
    """Of each half of the gated layer."""
    activation: str = "gelu_erf"
    epsilon: float = 1e-5
    dropout: float = 0.0
    pooling: str = "mean"
    """"mean", "cls" and the others of `models.pooling`."""
    dense: str = ""
    """Dense layers after the pooling; see `models.dense`."""
    global_every: int = 3
    """The first layer and every this many after it attend to all tokens."""
    local_window: int = 128
    """Number of tokens that the other layers attend to, half of them on each side."""
    global_theta: float = 160_000.0
    local_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                f"width {self.width} is not an even multiple of heads {self.heads}, which rotary "
                "positions take in pairs"
            )
        if self.global_every < 1 or self.local_window < 2:
            raise ValueError(
                f"global_every={self.global_every} must be at least 1 and "
                f"local_window={self.local_window} at least 2"
            )


# arXiv 2412.13663, table 4.
PRESETS: dict[str, ModernBertConfig] = {
    "ModernBERT-base": ModernBertConfig(),
    "ModernBERT-large": ModernBertConfig(width=1024, depth=28, heads=16, mlp_width=2624),
    "tiny": ModernBertConfig(
        vocab_size=2048, max_tokens=32, width=64, depth=3, heads=2, mlp_width=96, local_window=8
    ),
}


def token_angles(places: int, size: int, theta: float) -> Float[Array, "s k"]:
    """Returns angles of rotary positions 0, 1, ... for heads of `size`, equal for both halves."""
    frequencies = 1.0 / theta ** (np.arange(size // 2, dtype=np.float32) / (size // 2))
    half = np.arange(places, dtype=np.float32)[:, None] * frequencies[None, :]
    return jnp.asarray(np.concatenate([half, half], axis=1), jnp.float32)


class RotaryAttention(nnx.Module):
    """Self-attention without biases, over all tokens or within a window."""

    def __init__(
        self, config: ModernBertConfig, execution: Execution, layer: int, *, rngs: nnx.Rngs
    ) -> None:
        def project() -> Any:
            return linear(config.width, config.width, execution, rngs, bias=False)

        self.query, self.key, self.value, self.out = project(), project(), project(), project()
        self.heads = config.heads
        sees_all = layer % config.global_every == 0
        self.theta = config.global_theta if sees_all else config.local_theta
        self.window = 0 if sees_all else config.local_window // 2

    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"]) -> Float[Array, "b s d"]:
        b, s, d = x.shape
        query, key, value = (
            project(x).reshape(b, s, self.heads, d // self.heads)
            for project in (self.query, self.key, self.value)
        )
        angles = token_angles(s, d // self.heads, self.theta)
        mixed = attend_pairs(
            turned(query, angles), turned(key, angles), value, mask, window=self.window
        )
        return self.out(mixed.reshape(b, s, d))


class ModernBertBlock(nnx.Module):
    """Attention and gated MLP, each after a norm, except the first block's attention."""

    def __init__(
        self,
        config: ModernBertConfig,
        stack: TransformerConfig,
        execution: Execution,
        layer: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = nnx.data(None if layer == 0 else _norm(config, execution, rngs))
        self.attention = RotaryAttention(config, execution, layer, rngs=rngs)
        self.norm2 = _norm(config, execution, rngs)
        self.mlp = GatedMlp(stack, execution, bias=False, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: Float[Array, "b s d"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        keys = (None, None) if key is None else jax.random.split(key, 2)
        normed = x if self.norm1 is None else self.norm1(x)
        x = x + dropout(self.attention(normed, mask), self.dropout, keys[0])
        return x + dropout(self.mlp(self.norm2(x)), self.dropout, keys[1])


def _norm(config: ModernBertConfig, execution: Execution, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(
        config.width,
        narrow=jnp.dtype(execution.dtype),
        epsilon=config.epsilon,
        use_bias=False,
        use_fast_variance=False,
        param_dtype=execution.param_dtype,
        rngs=rngs,
    )


class ModernBert(TextEncoder):
    """Encoder of {"tokens": int32 (b, s), "mask": bool (b, s)}."""

    def __init__(self, config: ModernBertConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        refuse_scan("ModernBERT", execution)
        super().__init__(
            config, TransformerConfig.of(config, norm_order="pre"), execution, rngs=rngs
        )
        self.token_embedding = embedding(config.vocab_size, config.width, execution, rngs)
        self.embedding_norm = _norm(config, execution, rngs)
        self.norm = _norm(config, execution, rngs)

    def make_blocks(self, rngs: nnx.Rngs) -> nnx.Pytree:
        layers = range(self.config.depth)
        return nnx.List(
            [ModernBertBlock(self.config, self.stack, self.execution, n, rngs=rngs) for n in layers]
        )

    def embed(
        self,
        tokens: Int[Array, "b s"],
        mask: Bool[Array, "b s"],
        key: jax.Array | None = None,
    ) -> Float[Array, "b s d"]:
        """Returns the tokens' embeddings, normalised; positions enter in the attention."""
        del mask
        check_length(tokens.shape[1], self.config.max_tokens)
        return dropout(self.embedding_norm(self.token_embedding(tokens)), self.config.dropout, key)

    def finish(self, x: Float[Array, "b s d"]) -> Float[Array, "b s d"]:
        """Returns the result of the final norm of pre-norm blocks."""
        return self.norm(x)


# Names in ModernBERT files, as transformers writes them.
_OURS = r"encoder/blocks/\1"
_L = r"layers/(\d+)"


_JOINT = {
    "attn/Wqkv/kernel": ("attn/query/kernel", "attn/key/kernel", "attn/value/kernel"),
    "mlp/Wi/kernel": ("mlp/gate/kernel", "mlp/up/kernel"),
}


def _view(weights: Weights) -> Weights:
    return apart(without_prefix(flax_names(weights), "model/"), _parts)


def _parts(name: str) -> list[str]:
    joint = next((end for end in _JOINT if name.endswith("/" + end)), "")
    return [name.removesuffix(joint) + part for part in _JOINT.get(joint, ())]


_FILES = Layout(
    name="ModernBERT",
    signature=r"(model[./])?layers[./]0[./]attn[./]Wqkv[./](weight|kernel)",
    view=_view,
    rules=[
        Rule(r"embeddings/tok_embeddings/embedding", "encoder/token_embedding/embedding"),
        Rule(r"embeddings/norm/scale", "encoder/embedding_norm/scale"),
        Rule(rf"{_L}/attn_norm/scale", rf"{_OURS}/norm1/scale"),
        Rule(rf"{_L}/attn/(query|key|value)/kernel", rf"{_OURS}/attention/\2/kernel"),
        Rule(rf"{_L}/attn/Wo/kernel", rf"{_OURS}/attention/out/kernel"),
        Rule(rf"{_L}/mlp_norm/scale", rf"{_OURS}/norm2/scale"),
        Rule(rf"{_L}/mlp/(up|gate)/kernel", rf"{_OURS}/mlp/\2/kernel"),
        Rule(rf"{_L}/mlp/Wo/kernel", rf"{_OURS}/mlp/down/kernel"),
        Rule(r"final_norm/scale", "encoder/norm/scale"),
    ],
    # Heads for other tasks.
    ignore=[r"(head|decoder|classifier)/.*"],
)

_NAMES = {
    **{ours: theirs for ours, theirs in STACK.items() if ours not in ("activation", "epsilon")},
    "epsilon": "norm_eps",
    "vocab_size": "vocab_size",
    "max_tokens": "max_position_embeddings",
    "local_window": "local_attention",
    "global_every": "global_attn_every_n_layers",
    "global_theta": "global_rope_theta",
    "local_theta": "local_rope_theta",
}
_KINDS = {"global_theta": "full_attention", "local_theta": "sliding_attention"}


def _read_config(content: Mapping[str, Any]) -> dict[str, Any]:
    if content.get("model_type", "modernbert") != "modernbert":
        return {}
    biased = [name for name in ("norm_bias", "attention_bias", "mlp_bias") if content.get(name)]
    if biased:
        raise ValueError(f"{' and '.join(biased)}: a ModernBERT with biases is not supported")
    settings = named(content, _NAMES)
    if "hidden_activation" in content:
        settings |= named(
            {"hidden_act": content["hidden_activation"]}, {"activation": "hidden_act"}
        )
    settings |= _of_rope(content) | _of_layers(content)
    return settings


def _of_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the thetas of newer files, which name them by kind of layer."""
    if content.get("rope_scaling"):
        raise ValueError("rope_scaling: only plain rotary positions are supported")
    thetas: dict[str, Any] = {}
    for ours, kind in _KINDS.items():
        rope = (content.get("rope_parameters") or {}).get(kind) or {}
        if rope.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_type {rope['rope_type']!r}: only plain rotary positions are supported"
            )
        if "rope_theta" in rope:
            thetas[ours] = rope["rope_theta"]
    return thetas


def _of_layers(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how often a layer attends to everything, from newer files' list of layers."""
    kinds = content.get("layer_types")
    if not kinds:
        return {}
    for every in range(1, len(kinds) + 1):
        pattern = [
            "sliding_attention" if n % every else "full_attention" for n in range(len(kinds))
        ]
        if pattern == list(kinds):
            return {"global_every": every}
    raise ValueError(
        "layer_types is not a pattern in which the first and every N-th layer after it see all "
        "tokens"
    )


MODERNBERT = EncoderFamily(
    ModernBertConfig,
    ModernBert,
    "text",
    PRESETS,
    [_FILES],
    _read_config,
    model_types=("modernbert",),
)
