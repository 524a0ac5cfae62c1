"""The tiled loss with its own gradient rule: memory O(N block), 8 N^2 d flops, 6 N^2 d when one
side needs no gradient.

`pair_losses` gives L(U->V) and L(V->U) of `cwcl_jax.losses.reference.weighted` for weights that are
made tile by tile, or for the own pair as the only target. The paper's weights need no tiles at all:
`closed_form_correction` turns own-pair targets into them in O(N d k).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cwcl_jax.losses.reference import wide
from cwcl_jax.losses.tiles import Side, Stats, Tiling, backward_sweep, forward_sweep, inner

NO_FORWARD_MODE = (
    "The tiled losses have first derivatives in reverse mode only (jax.grad, jax.vjp). For "
    "jax.jvp, jax.jacfwd or second derivatives use form='dense'."
)


@runtime_checkable
class Engine(Protocol):
    """Runs the two sweeps over global arrays; hashable."""

    def forward(
        self, tiling: Tiling, rows: Side, columns: Side, scalars: Stats
    ) -> tuple[Stats, Stats]: ...

    def backward(
        self,
        tiling: Tiling,
        rows: Side,
        columns: Side,
        scalars: Stats,
        row_factors: Stats,
        column_factors: Stats,
        needed: tuple[bool, bool],
    ) -> tuple[Array | None, Array | None]: ...

    def sampled(self, p: Array, labels: Array | None, stride: int, body: Callable) -> Any: ...


def duplicates(row_labels: Array, labels: Array, row_places: Array, places: Array) -> Array:
    """Which columns are other pairs than the row's own, of its label."""
    same = row_labels[:, None] == labels[None, :]
    return same & (row_places[:, None] != places[None, :])


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """All rows against all columns."""

    def sampled(
        self, p: Float[Array, "n k"], labels: Array | None, stride: int, body: Callable
    ) -> Any:
        """`body(own, cosines, duplicates, sum_over_columns)`: every `stride`-th row, all columns.

        `duplicates` are the other pairs of the row's label, None without labels.
        """
        rows, places = p[::stride], jnp.arange(p.shape[0])
        own = jnp.square(rows.astype(wide(rows))).sum(axis=1)
        same = None
        if labels is not None:
            same = duplicates(labels[::stride], labels, places[::stride], places)
        return body(own, inner(rows, p, "highest"), same, lambda x: x)

    def forward(self, tiling, rows, columns, scalars):
        return forward_sweep(tiling, rows, columns, scalars, jnp.zeros((), jnp.int32))

    def backward(self, tiling, rows, columns, scalars, row_factors, column_factors, needed):
        first = jnp.zeros((), jnp.int32)
        return backward_sweep(
            tiling, rows, columns, scalars, first, row_factors, column_factors, needed
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def pair_losses(
    tiling: Tiling,
    engine: Engine,
    epsilon: float,
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    scale: Float[Array, ""],
    extras: Side,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Stats]]:
    """L(U->V), L(V->U), and the statistics of rows and columns that diagnostics are made of.

    Differentiable in u, v and scale, in reverse mode; the sides without gradient cost nothing.

    Args:
      tiling: how the weights are made.
      engine: where the sweeps run.
      epsilon: added to the row sums of weights.
      u, v: rows of unit norm.
      scale: s = 1/tau.
      extras: what the weights need: "p", "labels", "targets" (rows), "sharpness"; and
        "rows_deficit", "columns_deficit" where own-pair targets stand for closed-form weights
        whose normalised rows sum to 1 + deficit.
    """
    rows, columns, scalars = _sides(u, v, scale, extras)
    row_stats, column_stats = engine.forward(tiling, rows, columns, scalars)
    stats = {"rows": row_stats, "columns": column_stats}
    return (
        _mean_loss(row_stats, tiling.rows_weighted, epsilon, extras.get("rows_deficit")),
        _mean_loss(column_stats, tiling.columns_weighted, epsilon, extras.get("columns_deficit")),
        stats,
    )


def _sides(u, v, scale, extras) -> tuple[Side, Side, Stats]:
    rows = {"x": u} | {k: extras[k] for k in ("p", "labels", "targets") if k in extras}
    columns = {"x": v} | {k: extras[k] for k in ("p", "labels") if k in extras}
    scalars = {"scale": scale, "first_column": jnp.zeros((), jnp.int32)}
    if "sharpness" in extras:
        scalars["sharpness"] = extras["sharpness"]
    return rows, columns, scalars


def _mean_loss(stats: Stats, weighted: bool, epsilon: float, deficit: Array | None) -> Array:
    if not weighted:
        # The difference first: both are near 1/tau for a pair that is matched well.
        terms = (stats["max"] - stats["own"]) + jnp.log(stats["sum"])
        if deficit is not None:
            terms += deficit * (stats["max"] + jnp.log(stats["sum"]))
        return terms.mean()
    share = 1 / (stats["weights"] + epsilon)
    log_sum_exp = stats["max"] + jnp.log(stats["sum"])
    return (stats["weights"] * share * log_sum_exp - share * stats["weighted_logits"]).mean()


@jax.custom_jvp
def once_differentiable(residuals):
    """The identity, whose derivative is an error: the backward rules have none of their own."""
    return residuals


@once_differentiable.defjvp
def _no_second_derivative(primals, tangents):
    raise TypeError(NO_FORWARD_MODE)


def values_of(extras: dict[str, Any]) -> Side:
    """Plain arrays of what a forward rule gets with `symbolic_zeros`."""
    return {name: x.value for name, x in extras.items()}


def _forward_rule(tiling, engine, epsilon, u, v, scale, extras):
    values = values_of(extras)
    outputs: Any = pair_losses(tiling, engine, epsilon, u.value, v.value, scale.value, values)
    stats = outputs[2]
    kept = {
        side: {k: x for k, x in stats[side].items() if k in ("max", "sum", "weights")}
        for side in ("rows", "columns")
    }
    # None or () instead of a bool: residuals are arrays, but their structure is static.
    needed = {
        name: () if x.perturbed else None for name, x in (("u", u), ("v", v), ("scale", scale))
    }
    kept = once_differentiable(kept)
    return outputs, (u.value, v.value, scale.value, values, kept, needed)


def _factors(stats, weighted: bool, cotangent, epsilon: float, deficit: Array | None) -> Stats:
    """a and e (or c and f) of the equation in `tiles`, for a direction's cotangent."""
    if cotangent is None:
        return {}
    factors = {"max": stats["max"], "softmax": cotangent / stats["sum"]}
    if weighted:
        share = cotangent / (stats["weights"] + epsilon)
        factors["softmax"] = factors["softmax"] * (stats["weights"] / (stats["weights"] + epsilon))
        factors["weights"] = share
    elif deficit is not None:
        factors["softmax"] = factors["softmax"] * (1 + deficit)
    return factors


def _backward_rule(tiling, engine, epsilon, residuals, cotangents):
    u, v, scale, extras, stats, needed = residuals
    g_rows, g_columns = (None if isinstance(g, SymbolicZero) else g for g in cotangents[:2])
    need = {name: x is not None for name, x in needed.items()}
    if (g_rows is None and g_columns is None) or not any(need.values()):
        return None, None, None, None
    # Narrow gradients must not underflow: the tiles see cotangents of size 1 and no 1/N.
    given = [jnp.abs(g) for g in (g_rows, g_columns) if g is not None]
    size = jnp.maximum(jnp.max(jnp.stack(given)), jnp.finfo(wide(u)).tiny)
    g_rows, g_columns = (None if g is None else g / size for g in (g_rows, g_columns))
    rows, columns, scalars = _sides(u, v, scale, extras)
    zero = jnp.zeros((), wide(u))
    scalars["own"] = (zero if g_rows is None or tiling.rows_weighted else g_rows) + (
        zero if g_columns is None or tiling.columns_weighted else g_columns
    )
    need_v = need["v"] or not need["u"]  # either side yields the gradient of the scale
    du, dv = engine.backward(
        tiling,
        rows,
        columns,
        scalars,
        _factors(stats["rows"], tiling.rows_weighted, g_rows, epsilon, extras.get("rows_deficit")),
        _factors(
            stats["columns"],
            tiling.columns_weighted,
            g_columns,
            epsilon,
            extras.get("columns_deficit"),
        ),
        (need["u"], need_v),
    )
    size = size / u.shape[0]
    d_scale = None
    if need["scale"]:
        x, dx = (v, dv) if dv is not None else (u, du)
        d_scale = (x.astype(wide(x)) * dx).sum() * size
    finish = scale * size
    return (
        (du * finish).astype(u.dtype) if need["u"] else None,
        (dv * finish).astype(v.dtype) if need["v"] else None,
        d_scale,
        None,
    )


pair_losses.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def closed_form_correction(
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    p: Float[Array, "n k"] | None,
    scale: Float[Array, ""],
    *,
    constant: float,
    slope: float,
    own: float,
    epsilon: float,
    direction: str,
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """What turns own-pair targets into w_ij = constant + slope <p_i, p_j> + own [i = j].

    With r_i = sum_j w_ij = N constant + slope p_i . S_p + own, S_p = sum_j p_j,

        L(U->V) = L_own + s mean_i <u_i, v_i - sum_j w_ij v_j / r_i>
        sum_ij w_ij <u_i, v_j> / r_i = sum_j <v_j, y_j>,   U' = U / r by rows,
        y_j = constant sum_i u'_i + own u'_j + slope p_j (sum_i p_i u'_i^T)

    and the same with <u_i, v_j> / r_j for V->U. y is made of u, so its two products of O(N d k) are
    the gradient of v as well: with u and p constant there are no others. Sums in float32 or better
    at the highest matmul precision; plain autodiff, through p too if it is not detached.

    Returns:
      The correction to add, and the row sums of the weights.
    """
    dtype = wide(u)
    n = u.shape[0]
    u, v = u.astype(dtype), v.astype(dtype)
    row_sums = jnp.full(n, n * constant + own, dtype)
    if slope:
        assert p is not None
        p = p.astype(dtype)
        row_sums += slope * jnp.einsum("nk,k->n", p, p.sum(axis=0), precision="highest")
    share = (1 / (row_sums + epsilon))[:, None]
    before, after = (share, 1.0) if direction == "u_to_v" else (1.0, share)
    scaled = u * before
    y = constant * scaled.sum(axis=0, keepdims=True) + own * scaled
    if slope:
        moment = jnp.einsum("nk,nd->kd", p, scaled, precision="highest")
        y += slope * jnp.einsum("nk,kd->nd", p, moment, precision="highest")
    return scale * (v * (u - after * y)).sum(axis=1).mean(), row_sums
