"""An exponential moving average of the trained leaves, updated with the optimizer.

    ema_t = d_t ema_(t-1) + (1 - d_t) params_t        d_t = min(decay, 1 - (1 + t)^(-2/3))

with t = 0 for the first update of a run, so that the average begins with the leaves after it and
forgets the random start (the warm-up of timm's `ModelEmaV3`). Without the warm start d_t is `decay`
from the first update on, and the average begins with the initial leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.training.options import OptimizerConfig

_POWER = -2 / 3


def decay_at(config: OptimizerConfig, step: Any) -> jax.Array:
    """Returns d_t, a float32 scalar.

    Args:
      step: updates before this one, an integer scalar.
    """
    decay = jnp.float32(config.ema_decay)
    if not config.ema_warm_start:
        return decay
    return jnp.minimum(decay, 1 - (1 + jnp.asarray(step, jnp.float32)) ** _POWER)


def updated(
    config: OptimizerConfig, ema: Mapping[str, Any], params: Mapping[str, Any], step: Any
) -> dict[str, Any]:
    """Returns the average after one more update; {} if none is kept.

    Args:
      ema: path -> average, float32, sharded like the leaves.
      params: path -> leaf after the update.
      step: updates before this one.
    """
    keep = decay_at(config, step)
    return {path: keep * average + (1 - keep) * params[path] for path, average in ema.items()}


def begun(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the average that begins with these leaves: copies, because the step donates both."""
    return {path: jnp.copy(leaf) for path, leaf in params.items()}
