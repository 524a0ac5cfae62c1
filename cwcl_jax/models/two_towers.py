"""Two towers and the scale (and bias) of their logits."""

import math
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx

from cwcl_jax.models.tower import Tower, TowerConfig


class TwoTowers(nnx.Module):
    """The towers by modality, the stored log of the inverse temperature, and an optional bias."""

    def __init__(
        self,
        towers: Mapping[str, Tower],
        *,
        inverse_temperature: float,
        logit_bias: float | None,
    ) -> None:
        self.towers = nnx.Dict(towers)
        # Strongly typed float32 scalars: a weakly typed one would trace the step a second time.
        self.logit_scale = nnx.Param(jnp.full((), math.log(inverse_temperature), jnp.float32))
        if logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.full((), logit_bias, jnp.float32))


def build_two_towers(
    towers: Mapping[str, TowerConfig],
    *,
    embed_dim: int,
    inverse_temperature: float,
    logit_bias: float | None,
    dtype: str,
    rngs: nnx.Rngs,
) -> TwoTowers:
    """Build both towers. Under `nnx.eval_shape` nothing is allocated."""
    if len(towers) != 2:
        raise ValueError(f"a model has two towers, got {len(towers)}: {', '.join(towers)}")
    if inverse_temperature <= 0:
        raise ValueError(f"inverse_temperature must be positive, got {inverse_temperature}")
    built = {}
    for modality, config in towers.items():
        try:
            built[modality] = Tower(config, embed_dim=embed_dim, dtype=dtype, rngs=rngs)
        except ValueError as error:
            raise ValueError(f"tower {modality!r}: {error}") from error
    return TwoTowers(built, inverse_temperature=inverse_temperature, logit_bias=logit_bias)
