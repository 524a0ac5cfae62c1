"""Weight functions of a similarity, and the sharpness of the calibrated ones.

Every function maps similarities of the locked features to non-negative weights, elementwise, so a
tile of weights can be computed from two blocks of features. `sharpness` is 1/temperature of the
exponential kernel, the exponent of the rectified cosine, or 1/scale of distances. With a fixed
sharpness, larger batches have flatter targets. The calibrated functions choose it for every batch,
without gradient, so that the positive pair's mean share (or the effective number of positives)
keeps a given value.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import core
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from cwcl_jax.extension import import_named
from cwcl_jax.losses.numerics import wide

# (similarity, sharpness) -> weight
WeightFunction = Callable[[Array, ArrayLike], Array]

# Name -> defaults of the numbers that may follow it.
NUMBERS: dict[str, tuple[float, ...]] = {
    "identity": (),
    "affine": (),
    "centred": (),
    "uniform": (1.0,),
    "exp": (0.1,),
    "relu": (2.0,),
    "calibrated": (0.5,),
    "calibrated_relu": (0.5,),
    "labels": (0.0,),
    "distance": (0.3, 0.75),
}
# Number of rows that estimate the calibration and the entropy of closed-form weights; batches up to
# this size are exact.
SAMPLED_ROWS = 128
# Bounds of the calibration's bisection, and its steps: 50 leave a relative width of 1e-14.
_SHARPNESS_RANGE = (1e-3, 1e5)
_HALVINGS = 50


def affine(cosine: Array, sharpness: ArrayLike) -> Array:
    """Returns the paper's cos/2 + 1/2."""
    del sharpness
    return cosine / 2 + 0.5


def exponential(cosine: Array, sharpness: ArrayLike) -> Array:
    """Returns exp((cos - 1) * sharpness): 1 for identical rows, even if rounding makes cos > 1."""
    return jnp.exp((jnp.minimum(cosine, 1) - 1) * sharpness)


def rectified_power(cosine: Array, sharpness: ArrayLike) -> Array:
    """Returns max(cos, 0) ** sharpness."""
    positive = cosine > 0
    return jnp.where(positive, jnp.power(jnp.where(positive, cosine, 1), sharpness), 0)


def rectified_square(cosine: Array, sharpness: ArrayLike) -> Array:
    """Returns max(cos, 0) ** 2, without the logarithm and exponential of the general power."""
    del sharpness
    return jnp.square(jnp.maximum(cosine, 0))


@dataclasses.dataclass(frozen=True)
class ArcTangent:
    """Maps distances to 1 - 4/pi atan(squared distance * sharpness), 0 below `least`."""

    least: float

    def __call__(self, squared_distance: Array, sharpness: ArrayLike) -> Array:
        ratio = squared_distance * sharpness
        if math.tan(math.pi / 4 * (1 - self.least)) < _SERIES_UP_TO:
            # Larger ratios have weight 0 anyway.
            angle = _arctan_series(jnp.minimum(ratio, _SERIES_UP_TO))
        else:
            angle = jnp.arctan(ratio)
        weights = 1 - angle * (4 / jnp.pi)
        return jnp.where(weights < self.least, 0, weights)


# Up to this value the arctangent's series is exact with few terms, and cheaper than the function.
_SERIES_UP_TO = 0.25


def _arctan_series(x: Array) -> Array:
    """Returns x - x^3/3 + x^5/5 - ..., up to the first term below the dtype's rounding."""
    precise, square, total = jnp.finfo(x.dtype).eps / 4, x * x, jnp.zeros_like(x)
    count = next(k for k in range(40) if _SERIES_UP_TO ** (2 * k) / (2 * k + 1) < precise)
    for k in reversed(range(count)):
        total = total * square + (-1) ** k / (2 * k + 1)
    return x * total


@jax.custom_jvp
def _constant(parameter):
    """Returns its argument; differentiating it is an error, as tiles cannot do so."""
    return parameter


@_constant.defjvp
def _no_gradient(primals, tangents):
    raise TypeError(
        "weight_function depends on a parameter that needs a gradient, which the tiled forms do "
        "not compute; train it with form='dense' and detach_weights=False, or pass the parameter "
        "through jax.lax.stop_gradient."
    )


def with_constant_parameters(function: Callable[[Array], Array], dtype: jnp.dtype):
    """Returns the function with closed-over values as constants, which refuse gradients."""

    def traced(cosine):
        return jax.make_jaxpr(function, return_shape=True)(cosine)

    example, _ = traced(jax.ShapeDtypeStruct((2, 2), dtype))
    if not any(isinstance(x, core.Tracer) for x in example.consts):
        return function
    constants = [_constant(x) if isinstance(x, core.Tracer) else x for x in example.consts]

    def call(cosine):
        closed, shape = traced(cosine)
        flat = core.eval_jaxpr(closed.jaxpr, constants, cosine)
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return call


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """Adapts a caller's function of the cosine alone to the signature of the functions above."""

    function: Callable[[Array], Array]

    def __call__(self, cosine: Array, sharpness: ArrayLike) -> Array:
        del sharpness
        weights = jnp.asarray(self.function(cosine))
        if weights.shape != cosine.shape:
            raise ValueError(
                f"weight_function maps cosines of shape {cosine.shape} to {weights.shape}; it must "
                "work elementwise."
            )
        return weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weight function by name: "relu2" has `name` "relu" and `numbers` (2.0,).

    Attributes:
      text: the configured text.
      name: a key of `NUMBERS`, or "own".
      numbers: the numbers after the name.
      own: the caller's function.
    """

    text: str
    name: str
    numbers: tuple[float, ...] = ()
    own: Callable[[Array], Array] | None = None

    @property
    def of_features(self) -> bool:
        """Whether the weights are a function of a tower's features."""
        return self.name not in ("identity", "uniform", "labels")

    @property
    def calibrated(self) -> bool:
        """Whether every batch has its own sharpness."""
        return self.name.startswith("calibrated")

    @property
    def fixed_sharpness(self) -> float:
        """The configured sharpness, for functions that have one."""
        if self.name in ("exp", "distance"):
            return 1 / self.numbers[0]
        return self.numbers[0] if self.name == "relu" else 1.0

    def function(self) -> WeightFunction:
        """Returns the function (similarity, sharpness) -> weight, for weights of features."""
        if self.own is not None:
            return UserFunction(self.own)
        if self.name == "distance":
            return ArcTangent(self.numbers[1])
        if self.name == "relu" and self.numbers[0] == 2:
            return rectified_square
        return {
            "affine": affine,
            "centred": affine,
            "exp": exponential,
            "calibrated": exponential,
            "relu": rectified_power,
            "calibrated_relu": rectified_power,
        }[self.name]


def parse_number(text: str) -> tuple[str, tuple[float, ...]]:
    """Returns a name and the numbers after it: "distance0.3_0.75" -> "distance", (0.3, 0.75)."""
    number = r"\d+(?:\.\d+)?"
    match = re.fullmatch(rf"([a-z_]*?)({number}(?:_{number})*)?", text)
    if not match:
        return text, ()
    return match[1], tuple(float(x) for x in match[2].split("_")) if match[2] else ()


def parse_weights(text: str, own: Callable[[Array], Array] | None = None) -> Weights:
    """Returns the weight function of a name, or the caller's own if given.

    Raises:
      ValueError: an unknown name, too many numbers, or numbers out of range.
    """
    if own is not None:
        return Weights("your own weight function", "own", own=own)
    if ":" in text:
        return Weights(text, "own", own=import_named(text, "weight function"))
    name, numbers = parse_number(text)
    if name not in NUMBERS:
        known = ", ".join(n + "NUMBER" * bool(x) for n, x in NUMBERS.items() if n != "identity")
        raise ValueError(f"weight_function={text!r} is not known; use one of {known}.")
    defaults = NUMBERS[name]
    if len(numbers) > len(defaults):
        raise ValueError(f"weight_function={text!r}: {name} takes {len(defaults) or 'no'} number.")
    numbers = (*numbers, *defaults[len(numbers) :])
    _check_numbers(text, name, numbers)
    return Weights(text, name, numbers)


def _check_numbers(text: str, name: str, numbers: tuple[float, ...]) -> None:
    first = numbers[0] if numbers else 0.0
    if name.startswith("calibrated") and not (0 < first < 1 or first > 1):
        raise ValueError(
            f"weight_function={text!r}: the number must lie between 0 and 1 (the positive pair's "
            "share) or above 1 (effective positives)."
        )
    if name in ("exp", "relu", "distance") and not first > 0:
        raise ValueError(f"weight_function={text!r}: the number must be positive.")
    if name == "labels" and first > 1:
        raise ValueError(f"weight_function={text!r}: the number must lie between 0 and 1.")


def centre(p: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """Returns the embeddings without their mean over the batch, normalised again."""
    mean_free = p.astype(wide(p))
    mean_free = mean_free - mean_free.mean(axis=0, keepdims=True)
    sum_of_squares = jnp.square(mean_free).sum(axis=1, keepdims=True)
    return mean_free * jax.lax.rsqrt(jnp.maximum(sum_of_squares, 1e-12**2))


def channel_profiles(
    profiles: Float[Array, "n c f"], epsilon: float = 1e-8
) -> Float[Array, "n c*f"]:
    """Returns (n, c*f) rows whose inner products are the channels' cosines, averaged over channels.

    For raw feature profiles of several channels, such as CellCLIP's. `epsilon` is added to the
    norms.
    """
    n, channels, features = profiles.shape
    x = profiles.astype(wide(profiles))
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    # A channel may be all zero. There the root's derivative is infinite; its gradient must be 0.
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    x = x / (norms + epsilon) / jnp.sqrt(jnp.asarray(channels, x.dtype))
    return x.reshape(n, channels * features)


def prepared(weights: Weights, features: Array, *, detach: bool) -> Array:
    """Returns features as the weights use them; profiles (n, channels, features) become rows."""
    if weights.name == "distance":
        # Centring keeps distances, but shrinks the squared norms that cancel in them.
        rows = features.reshape(len(features), -1).astype(wide(features))
        rows = rows - rows.mean(axis=0, keepdims=True)
    else:
        rows = channel_profiles(features) if features.ndim == 3 else features
    if weights.name == "centred":
        rows = centre(rows)
    return jax.lax.stop_gradient(rows) if detach else rows


def guide_limits(rows: Float[Array, "n k"], kind: str, margin: float) -> Float[Array, " n"]:
    """Returns, for each row, the similarity above which another pair is left out.

    The limit is relative to the row's similarity with itself.
    """
    own = jnp.square(rows.astype(wide(rows))).sum(axis=1)
    return own * (1 - margin) if kind == "relative" else own - margin


def calibrate(
    weights: Weights,
    own: Float[Array, " r"],
    cosines: Float[Array, "r n"],
    duplicates: str = "negatives",
    same: Bool[Array, "r n"] | None = None,
    sum_over_devices: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, ""]:
    """Returns the sharpness at which the rows' targets have the configured peakedness.

    Args:
      weights: gives the function of cosine and sharpness, and the target share or number.
      own: cosine of each sampled row with itself.
      cosines: of the sampled rows with all columns (on a mesh: with this device's).
      duplicates: how other pairs with the same content are treated.
      same: mask of the other pairs with the same content as the row's positive pair.
      sum_over_devices: completes a sum over columns on a mesh.
    """
    function, wanted = weights.function(), weights.numbers[0]

    def too_flat(sharpness):
        values = function(cosines, sharpness)
        if same is not None:
            values = jnp.where(same, float(duplicates == "positives"), values)
        row_sums = sum_over_devices(values.sum(axis=1))
        if wanted > 1:
            row_sums_log = sum_over_devices(xlogx(values).sum(axis=1))
            entropies = jnp.log(row_sums) - row_sums_log / row_sums
            return jnp.exp(entropies.mean()) > wanted
        return (function(own, sharpness) / row_sums).mean() < wanted

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        flat = too_flat(jnp.exp(middle))
        return jnp.where(flat, middle, low), jnp.where(flat, high, middle)

    low, high = (jnp.log(jnp.asarray(x, cosines.dtype)) for x in _SHARPNESS_RANGE)
    low, high = jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return jnp.exp((low + high) / 2)


def xlogx(x: Array) -> Array:
    """Returns x log x, and 0 at 0."""
    return x * jnp.log(jnp.where(x > 0, x, 1))


def sample_stride(n: int) -> int:
    """Returns the sampling stride: 1 (all rows) for batches up to `SAMPLED_ROWS`."""
    return -(-n // SAMPLED_ROWS)
