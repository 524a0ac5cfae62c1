"""Heads from features to the shared space: none, one bias-free dense layer, or an MLP."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.transformer import Execution, layer_norm, linear

HEADS = ("none", "linear", "mlp")


class LinearHead(nnx.Module):
    """One dense layer without bias, as in CLIP and LiT."""

    def __init__(self, width: int, embed_dim: int, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.projection = linear(width, embed_dim, execution, rngs, bias=False)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        return self.projection(features)


class MlpHead(nnx.Module):
    """Norm, a hidden layer of twice the embedding's width, GELU, and a bias-free projection."""

    def __init__(self, width: int, embed_dim: int, execution: Execution, *, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(width, 1e-6, execution, rngs)
        self.hidden = linear(width, 2 * embed_dim, execution, rngs)
        self.projection = linear(2 * embed_dim, embed_dim, execution, rngs, bias=False)

    def __call__(self, features: Float[Array, "b f"]) -> Float[Array, "b d"]:
        hidden = jax.nn.gelu(self.hidden(self.norm(features)), approximate=False)
        return self.projection(hidden)


def make_head(
    kind: str, width: int, embed_dim: int, execution: Execution, *, rngs: nnx.Rngs
) -> LinearHead | MlpHead | None:
    """Returns the head named `kind`; "none" requires features of the embedding's width."""
    if kind == "linear":
        return LinearHead(width, embed_dim, execution, rngs=rngs)
    if kind == "mlp":
        return MlpHead(width, embed_dim, execution, rngs=rngs)
    if kind != "none":
        raise ValueError(f"unknown head {kind!r}; choose one of {', '.join(HEADS)}")
    if width != embed_dim:
        raise ValueError(
            f"head='none' leaves features of width {width}, but embed_dim is {embed_dim}: set "
            f"embed_dim={width}, or head='linear'"
        )
    return None
