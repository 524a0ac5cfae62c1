"""Two towers and the scale (and bias) of their logits."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from cwcl_jax.models.tower import Tower, TowerConfig


class TwoTowers(nnx.Module):
    """The towers by name, the stored log of the inverse temperature, and an optional bias."""

    def __init__(
        self,
        towers: Mapping[str, Tower],
        *,
        inverse_temperature: float,
        logit_bias: float | None,
    ) -> None:
        self.towers = nnx.Dict(towers)
        # Strongly typed float32 scalars: a weakly typed one would retrace the step.
        self.logit_scale = nnx.Param(jnp.full((), math.log(inverse_temperature), jnp.float32))
        if logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.full((), logit_bias, jnp.float32))


def build_two_towers(
    towers: Mapping[str, TowerConfig],
    arrays: Mapping[str, Mapping[str, Any]],
    *,
    embed_dim: int,
    inverse_temperature: float,
    logit_bias: float | None,
    dtype: str,
    precision: str = "highest",
    rngs: nnx.Rngs,
) -> TwoTowers:
    """Builds and returns the towers. Under `nnx.eval_shape` nothing is allocated.

    Args:
      towers: settings by the tower's name.
      arrays: by tower, name -> (shape, dtype) of one example's inputs.
    """
    if len(towers) != 2:
        raise ValueError(f"a model has two towers, got {len(towers)}: {', '.join(towers)}")
    if inverse_temperature <= 0:
        raise ValueError(f"inverse_temperature must be positive, got {inverse_temperature}")
    built = {}
    for name, config in towers.items():
        try:
            built[name] = Tower(
                config,
                arrays[name],
                embed_dim=embed_dim,
                dtype=dtype,
                precision=precision,
                rngs=rngs,
            )
        except ValueError as error:
            raise ValueError(f"tower {name!r}: {error}") from error
    return TwoTowers(built, inverse_temperature=inverse_temperature, logit_bias=logit_bias)
