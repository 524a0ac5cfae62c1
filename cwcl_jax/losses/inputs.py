"""The arrays of one call of the loss, and what is computed from them before the first tile."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cwcl_jax.losses import weights
from cwcl_jax.losses.engines import Engine, OneDevice
from cwcl_jax.losses.numerics import wide
from cwcl_jax.losses.options import Frame


@dataclasses.dataclass
class Inputs:
    """The checked arrays of one call.

    Attributes:
      p, q: features of U and V that define weights and masks.
      labels: (n,) integers, or (n, k) sets as returned by `labels.label_sets`.
      targets: the caller's own weights of all pairs, (n, n).
      mix: the positive pair's share of the target at this point of the run.
    """

    u: Float[Array, "n d"]
    v: Float[Array, "n d"]
    logit_scale: Float[Array, ""]
    mix: Any = 0.0
    logit_bias: Float[Array, ""] | None = None
    p: Array | None = None
    q: Array | None = None
    labels: Array | None = None
    targets: Float[Array, "n n"] | None = None


def sharpness(frame: Frame, rows: Array, labels: Array | None, engine: Engine | None = None):
    """Returns the sharpness of the weight function, fixed or calibrated, as a scalar.

    Args:
      rows: prepared features, without gradient.
      labels: labels, if duplicates are defined by them.
      engine: where the sampled rows are; None means one device.
    """
    chosen = frame.weights
    if not chosen.calibrated:
        return jnp.asarray(chosen.fixed_sharpness, wide(rows))
    counted = labels if frame.duplicates in ("positives", "masked") else None

    def solve(own, cosines, same, sum_over_columns):
        return weights.calibrate(chosen, own, cosines, frame.duplicates, same, sum_over_columns)

    stride = weights.sample_stride(rows.shape[0])
    return (engine or OneDevice()).sampled(rows, counted, stride, solve)
