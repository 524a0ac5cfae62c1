"""Dense layers between pooling and features, as in sentence-transformers' models.

They are written as a string, so that a command line can set them: layers separated by commas, each
`WIDTH:ACTIVATION`, with the suffix `:no_bias` if it has no bias. LaBSE's is "768:tanh".
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.numerics import ACTIVATIONS, activate
from cwcl_jax.models.transformer import Execution, linear

KINDS = ("identity", "tanh", "sigmoid", "silu", *ACTIVATIONS)


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """One layer: the width of its output, its activation, and whether it has a bias."""

    width: int
    activation: str
    bias: bool = True

    def __str__(self) -> str:
        return f"{self.width}:{self.activation}" + ("" if self.bias else ":no_bias")


def layers_of(text: str) -> list[DenseLayer]:
    """Returns the layers that a setting names.

    Raises:
      ValueError: the setting has another format.
    """
    layers = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        width, _, rest = part.partition(":")
        activation, _, bias = rest.partition(":")
        if not width.isdecimal() or activation not in KINDS or bias not in ("", "no_bias"):
            raise ValueError(
                f"dense={text!r}: {part!r} is not WIDTH:ACTIVATION[:no_bias] with an activation of "
                f"{', '.join(KINDS)}"
            )
        layers.append(DenseLayer(int(width), activation, not bias))
    return layers


class Dense(nnx.Module):
    """One dense layer with an activation."""

    def __init__(
        self, fan_in: int, layer: DenseLayer, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        self.linear = linear(fan_in, layer.width, execution, rngs, bias=layer.bias)
        self.activation = layer.activation

    def __call__(self, x: Float[Array, "b f"]) -> Float[Array, "b d"]:
        return _activated(self.linear(x), self.activation)


def _activated(x: jax.Array, kind: str) -> jax.Array:
    if kind == "identity":
        return x
    if kind == "tanh":
        return jnp.tanh(x)
    if kind == "sigmoid":
        return jax.nn.sigmoid(x)
    return jax.nn.silu(x) if kind == "silu" else activate(x, kind)


def dense_layers(
    text: str, width: int, execution: Execution, *, rngs: nnx.Rngs
) -> tuple[nnx.Pytree, int]:
    """Returns the layers that a setting names, and the width of the last one's output."""
    made = []
    for layer in layers_of(text):
        made.append(Dense(width, layer, execution, rngs=rngs))
        width = layer.width
    return nnx.List(made), width
