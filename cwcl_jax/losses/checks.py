"""Checks of a loss's arguments: shapes and dtypes on every call, values on request."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array

# Allowed deviation of a row's norm from 1: bfloat16 rounds each entry by up to 2^-9.
_NORM_TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}


def check_embeds(name: str, x: Array, ranks: tuple[int, ...] = (2,)) -> None:
    """Raises unless `x` is a float array of an allowed rank without an axis of length 0."""
    if not hasattr(x, "ndim"):
        raise TypeError(f"{name} must be an array of shape (n, d), got {type(x).__name__}.")
    if x.ndim not in ranks:
        shapes = " or ".join({2: "2, (n, d)", 3: "3, (n, channels, features)"}[r] for r in ranks)
        raise ValueError(f"{name} must have rank {shapes}; got shape {tuple(x.shape)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be of a float type, got {x.dtype}; convert it first.")
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: an empty batch has no loss.")


def check_pair(u: Array, v: Array) -> None:
    """Raises unless u and v are embeddings of the same number of pairs with the same width."""
    check_embeds("u", u)
    check_embeds("v", v)
    check_rows("v", v, u.shape[0])
    if u.shape[1] != v.shape[1]:
        raise ValueError(
            f"u and v must have the same width, got {u.shape[1]} and {v.shape[1]}; project both "
            "into one space."
        )


def check_rows(name: str, x: Array, n: int) -> None:
    """Raises unless `x` has `n` rows."""
    if x.shape[0] != n:
        raise ValueError(
            f"{name} has {x.shape[0]} rows but u has {n}; row i of every array belongs to pair i."
        )


def check_weights_from(p: Array, n: int) -> None:
    """Raises unless p is an (n, k) array of embeddings or an (n, channels, features) array."""
    check_embeds("weights_from", p, ranks=(2, 3))
    check_rows("weights_from", p, n)


def check_labels(labels: Array, n: int) -> None:
    """Raises unless labels are n integers or n sets of integers."""
    if labels.ndim not in (1, 2) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be one integer for each pair, got {labels.dtype} of shape "
            f"{tuple(labels.shape)} (or a set: a row of integers, padded with -1)."
        )
    check_rows("labels", labels, n)


def check_targets(targets: Array, n: int) -> None:
    """Raises unless targets have shape (n, n)."""
    if targets.shape != (n, n):
        raise ValueError(
            f"targets must have shape ({n}, {n}), one weight for each pair of u and v; got "
            f"{tuple(targets.shape)}."
        )


def check_scalar(name: str, x: Array) -> None:
    """Raises unless x is a float scalar."""
    if x.shape != () or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be a float scalar, got {x.dtype} of shape {x.shape}.")


def check_not_explicit(name: str, x: Array) -> None:
    """Raises if `x` is split over a mesh with explicit axes that was not passed to the loss."""
    split = jax.typeof(x).sharding
    if any(split.spec) and AxisType.Explicit in split.mesh.axis_types:
        raise ValueError(
            f"{name} is split over a mesh with explicit axes, {split.mesh.axis_names}: pass mesh=, "
            "the same mesh, to the loss."
        )


def check_divisible(n: int, devices: int, axes: tuple[str, ...]) -> None:
    """Raises unless n rows split evenly over the mesh."""
    if n % devices:
        raise ValueError(
            f"u has {n} rows, not divisible by the {devices} devices of mesh axes {axes}; use a "
            f"global batch size that is a multiple of {devices}."
        )


def check_values(arrays: dict[str, Array | None]) -> None:
    """Checks values on the host: at once, or under tracing each time the computation runs.

    Knows "u", "v", "weights_from" (finite; unit norm for rank 2), "logit_scale", "logit_bias"
    (finite) and "weights" (smallest entry, row sum and column sum).
    """
    present = {name: x for name, x in arrays.items() if x is not None}
    jax.debug.callback(_check_on_host, present)


def _check_on_host(arrays: dict[str, Any]) -> None:
    # Weights come last, because wrong embeddings cause wrong weights.
    for name in sorted(arrays, key=lambda name: name == "weights"):
        x = np.asarray(arrays[name])
        kind = str(x.dtype)
        x = x.astype(np.float64)
        if name == "weights":
            _check_weights(*x)
            continue
        if not np.isfinite(x).all():
            rows = np.unique(np.nonzero(~np.isfinite(x))[0])[:5] if x.ndim else "(scalar)"
            raise ValueError(f"{name} is not finite, first in rows {rows}.")
        if x.ndim == 2:
            norms = np.linalg.norm(x, axis=1)
            worst = int(np.argmax(np.abs(norms - 1)))
            if abs(norms[worst] - 1) > _NORM_TOLERANCE[kind]:
                raise ValueError(
                    f"{name} is not normalised: row {worst} has norm {norms[worst]:.6g}; divide "
                    "rows by their L2 norm."
                )


def _check_weights(smallest: float, row_sum: float, column_sum: float) -> None:
    if not smallest >= 0:
        raise ValueError(
            f"weight_function (or targets) gives a negative or undefined weight, {smallest:.6g}; "
            "weights must be at least 0."
        )
    for name, smallest_sum in (("row", row_sum), ("column", column_sum)):
        if not smallest_sum > 0:
            raise ValueError(
                f"weight_function (or targets) gives a {name} without any positive weight; every "
                f"{name} needs one."
            )
