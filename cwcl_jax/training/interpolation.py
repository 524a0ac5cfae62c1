"""WiSE-FT: weights between those that a run started from and those that it trained.

Wortsman et al. 2022, arXiv 2109.01903: the mean of a pretrained and a fine-tuned model often keeps
most of what tuning gained and loses less of what the pretrained model could do.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from cwcl_jax.config import ConfigError
from cwcl_jax.training.encode import Restored
from cwcl_jax.training.state import Blueprint, Leaves, import_towers


def interpolated(restored: Restored, share: float) -> Leaves:
    """Returns the plain model's leaves, `(1 - share) * start + share * trained`, in float32.

    Args:
      restored: a run's model; LoRA's sums are computed first.
      share: 0 is the start, 1 the trained weights.

    Raises:
      ConfigError: the share is not from 0 to 1, or a trained leaf started from random numbers.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"interpolate={share} must be from 0 (the start) to 1 (the trained weights)"
        )
    blueprint = restored.blueprint
    leaves = restored.plain
    changed = {x.kernel for x in blueprint.model_def.adapters} | restored.params.keys()
    start = _start(blueprint)
    for path in sorted(changed & leaves.keys()):
        if path not in start:
            tower = f"config.towers.{path.split('/')[1]}"
            weights = blueprint.config.towers[path.split("/")[1]].weights
            raise ConfigError(
                f"interpolate={share} is between the start and the trained weights, but {path} "
                f"started from random numbers: {tower}.weights={weights!r} "
                + ("holds nothing for it" if weights else "names no weights")
            )
        begun = jnp.asarray(start[path], jnp.float32)
        leaves[path] = (1 - share) * begun + share * jnp.asarray(leaves[path], jnp.float32)
    return leaves


def _start(blueprint: Blueprint) -> Leaves:
    """Returns the leaves before the first step, without those that started from random numbers."""
    temperature = blueprint.config.temperature
    scalars = {
        "logit_scale": np.float32(math.log(temperature.initial)),
        "logit_bias": np.float32(temperature.bias),
    }
    return scalars | import_towers(blueprint)[0]
