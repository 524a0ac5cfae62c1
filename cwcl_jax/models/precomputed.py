"""An encoder without parameters: its features come from a file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from cwcl_jax.models.family import EncoderFamily
from cwcl_jax.models.transformer import Execution


@dataclasses.dataclass(frozen=True)
class PrecomputedConfig:
    """Only the width must be known."""

    width: int = 0

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise ValueError(
                "a 'precomputed' tower needs the width of its features: overrides width=..."
            )


class Precomputed(nnx.Module):
    """Encoder of {"features": float (b, f)}."""

    def __init__(self, config: PrecomputedConfig, execution: Execution, *, rngs: nnx.Rngs) -> None:
        del rngs
        self.config = config
        self.execution = execution

    @property
    def feature_width(self) -> int:
        """Width of a feature vector."""
        return self.config.width

    def __call__(
        self, inputs: Mapping[str, Any], key: jax.Array | None = None
    ) -> Float[Array, "b f"]:
        del key
        features = inputs["features"]
        if features.shape[-1] != self.config.width:
            raise ValueError(
                f"precomputed features have width {features.shape[-1]}, the tower expects "
                f"{self.config.width}: set the tower's overrides width={features.shape[-1]}"
            )
        return features.astype(self.execution.dtype)


PRECOMPUTED = EncoderFamily(PrecomputedConfig, Precomputed, "features")
