"""Weight functions of the cosine, and the sharpness of the calibrated ones.

Every function maps cosines of the locked embeds to non-negative weights, entry by entry, so a tile
of weights can be made from two blocks of embeds. `sharpness` is 1/temperature of the exponential
kernel and the exponent of the rectified cosine. With a fixed sharpness the targets of a larger
batch are flatter; the calibrated functions choose it for every batch, without gradient, so that the
own pair's mean share (or the effective number of positives) keeps a given value.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from cwcl_jax.losses.options import LossConfig
from cwcl_jax.losses.reference import dot, wide

# (cosine, sharpness) -> weight
WeightFunction = Callable[[Array, ArrayLike], Array]

# Bounds of the calibration's search, and its halvings: 50 leave a relative width of 1e-14.
_SHARPNESS_RANGE = (1e-3, 1e5)
_HALVINGS = 50


def affine(cosine: Array, sharpness: ArrayLike) -> Array:
    """The paper's cos/2 + 1/2."""
    del sharpness
    return cosine / 2 + 0.5


def exponential(cosine: Array, sharpness: ArrayLike) -> Array:
    """exp((cos - 1) * sharpness): 1 for identical embeds, also where rounding makes cos > 1."""
    return jnp.exp((jnp.minimum(cosine, 1) - 1) * sharpness)


def rectified_power(cosine: Array, sharpness: ArrayLike) -> Array:
    """max(cos, 0) ** sharpness."""
    positive = cosine > 0
    return jnp.where(positive, jnp.power(jnp.where(positive, cosine, 1), sharpness), 0)


def rectified_square(cosine: Array, sharpness: ArrayLike) -> Array:
    """max(cos, 0) ** 2, without the general power's logarithm and exponential."""
    del sharpness
    return jnp.square(jnp.maximum(cosine, 0))


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """A caller's function of the cosine alone, in the form of the functions above."""

    function: Callable[[Array], Array]

    def __call__(self, cosine: Array, sharpness: ArrayLike) -> Array:
        del sharpness
        weights = jnp.asarray(self.function(cosine))
        if weights.shape != cosine.shape:
            raise ValueError(
                f"weight_function maps cosines of shape {cosine.shape} to {weights.shape}; it must "
                "work entry by entry."
            )
        return weights


def elementwise(config: LossConfig) -> WeightFunction | None:
    """The function (cosine, sharpness) -> weight of a configuration; None if it has none."""
    if config.weight_function == "relu" and config.weight_power == 2:
        return rectified_square
    return {
        "affine": affine,
        "centred": affine,
        "exp": exponential,
        "calibrated": exponential,
        "relu": rectified_power,
        "calibrated_relu": rectified_power,
    }.get(config.weight_function)


def fixed_sharpness(config: LossConfig) -> float | None:
    """The configured sharpness, or None where every batch has its own."""
    if config.weight_function.startswith("calibrated"):
        return None
    if config.weight_function == "exp":
        return 1 / config.weight_temperature
    return config.weight_power


def centre(p: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Embeds without their mean over the batch, normalised again."""
    mean_free = p.astype(wide(p))
    mean_free = mean_free - mean_free.mean(axis=0, keepdims=True)
    sum_of_squares = jnp.square(mean_free).sum(axis=1, keepdims=True)
    return mean_free * jax.lax.rsqrt(jnp.maximum(sum_of_squares, 1e-12**2))


def channel_profiles(
    profiles: Float[Array, "n c f"], epsilon: float = 1e-8
) -> Float[Array, "n c*f"]:
    """Rows whose inner products are the mean over channels of the channels' cosines.

    For raw feature profiles of several channels, as CellCLIP's. `epsilon` is added to the norms.
    """
    n, channels, features = profiles.shape
    x = profiles.astype(wide(profiles))
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    # A channel may be all zero, where the root's derivative is infinite: its gradient is 0.
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    x = x / (norms + epsilon) / jnp.sqrt(jnp.asarray(channels, x.dtype))
    return x.reshape(n, channels * features)


def calibrate(
    function: WeightFunction,
    own: Float[Array, " r"],
    cosines: Float[Array, "r n"],
    config: LossConfig,
    duplicates: Bool[Array, "r n"] | None = None,
    sum_over_devices: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """The sharpness at which the rows' targets have the configured peakedness.

    Args:
      function: the weights as a function of cosine and sharpness, sharper for larger values.
      own: cosine of each sampled row with itself.
      cosines: of the sampled rows with all (on a mesh: this device's) columns.
      config: gives `target_diagonal` or `target_positives`, and what duplicates are.
      duplicates: other pairs of the same label as the row's own.
      sum_over_devices: completes a sum over columns on a mesh.
    """

    def too_flat(sharpness):
        weights = function(cosines, sharpness)
        if duplicates is not None:
            weights = jnp.where(duplicates, float(config.duplicates == "positives"), weights)
        row_sums = sum_over_devices(weights.sum(axis=1))
        if config.target_positives:
            row_sums_log = sum_over_devices(xlogx(weights).sum(axis=1))
            entropies = jnp.log(row_sums) - row_sums_log / row_sums
            return jnp.exp(entropies.mean()) > config.target_positives
        return (function(own, sharpness) / row_sums).mean() < config.target_diagonal

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        flat = too_flat(jnp.exp(middle))
        return jnp.where(flat, middle, low), jnp.where(flat, high, middle)

    low, high = (jnp.log(jnp.asarray(x, cosines.dtype)) for x in _SHARPNESS_RANGE)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return jnp.exp((low + high) / 2)


def xlogx(x: Array) -> Array:
    """x log x, 0 at 0."""
    return x * jnp.log(jnp.where(x > 0, x, 1))


def weight_matrix(
    function: WeightFunction, p: Float[Array, "n k"], sharpness: ArrayLike
) -> Float[Array, "n n"]:
    """All weights at once, for the dense form."""
    return function(dot(p, p), sharpness)


def sample_stride(n: int, config: LossConfig) -> int:
    """Every how many rows one is sampled: 1 (all rows) for batches up to `sampled_rows`."""
    return -(-n // config.sampled_rows)
