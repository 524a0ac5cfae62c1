"""The tiled loss with its own gradient rule.

It needs O(N block) memory and 8 N^2 d flops, or 6 N^2 d if one side needs no gradient.

`pair_losses` returns the parts from which `cwcl_jax.losses.pairwise` builds the losses of both
directions, for weights that are computed tile by tile, or with the positive pair as the only
target. The paper's weights need no tiles: `closed_form_correction` turns the loss with
positive-pair targets into the weighted loss in O(N d k).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cwcl_jax.losses.engines import Engine
from cwcl_jax.losses.numerics import wide
from cwcl_jax.losses.tiles import Side, Stats, Tiling

NO_FORWARD_MODE = (
    "The tiled losses have first derivatives in reverse mode only (jax.grad, jax.vjp). For "
    "jax.jvp, jax.jacfwd or second derivatives use form='dense'."
)
# Names of the arrays in each side of `extras`.
_PER_PAIR = ("p", "q", "labels", "limit", "square_p", "square_q")
_SCALARS = ("sharpness_p", "sharpness_q", "mix")

Parts = dict[str, dict[str, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def pair_losses(
    tiling: Tiling,
    engine: Engine,
    epsilon: float,
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    scale: Float[Array, ""],
    extras: Side,
) -> tuple[Parts, dict[str, Stats]]:
    """Returns the parts of the losses of "rows" (U->V) and "columns" (V->U), and their statistics.

    Differentiable in u, v and scale, in reverse mode; sides that need no gradient cost nothing.

    Args:
      tiling: how the weights are computed.
      engine: where the sweeps run.
      epsilon: added to the row sums of the weights.
      u, v: rows of unit norm.
      scale: s = 1/tau.
      extras: what the weights need: "p", "q", "labels", "limit", "square_p", "square_q", "targets"
          (rows), "sharpness_p", "sharpness_q". Also "rows_deficit" and "columns_deficit", where
          positive-pair targets stand for closed-form weights whose normalised rows sum to 1 +
          deficit.

    Returns:
      By side: "own", the loss with positive pairs as targets; "closed", the same with the deficit;
          "soft", the loss with the weights as targets; "negatives", the term of that name.
    """
    rows, columns, scalars = sides_of(u, v, scale, extras)
    row_stats, column_stats = engine.forward(tiling, rows, columns, scalars)
    stats = {"rows": row_stats, "columns": column_stats}
    parts = {
        side: _mean_losses(stats[side], _weighted(tiling, side), epsilon, _deficit(extras, side))
        for side in stats
    }
    return parts, stats


def sides_of(u, v, scale, extras) -> tuple[Side, Side, Stats]:
    """Returns the arrays of rows and of columns for the sweeps, and the scalars."""
    rows = {"x": u} | {k: extras[k] for k in (*_PER_PAIR, "targets") if k in extras}
    columns = {"x": v} | {k: extras[k] for k in _PER_PAIR if k in extras}
    scalars = {"scale": scale, "first_column": jnp.zeros((), jnp.int32)}
    scalars |= {k: extras[k] for k in _SCALARS if k in extras}
    return rows, columns, scalars


def _weighted(tiling: Tiling, side: str) -> bool:
    return tiling.rows_weighted if side == "rows" else tiling.columns_weighted


def _deficit(extras: Side, side: str) -> Array | None:
    return extras.get(f"{side}_deficit")


def _mean_losses(stats: Stats, weighted: bool, epsilon: float, deficit: Array | None) -> dict:
    # Subtract first: both values are near 1/tau for a well matched pair.
    own = (stats["max"] - stats["own"]) + jnp.log(stats["sum"])
    log_sum_exp = stats["max"] + jnp.log(stats["sum"])
    losses = {"own": own.mean()}
    if deficit is not None:
        losses["closed"] = (own + deficit * log_sum_exp).mean()
    if weighted:
        share = 1 / (stats["weights"] + epsilon)
        terms = stats["weights"] * share * log_sum_exp - share * stats["weighted_logits"]
        losses["soft"] = terms.mean()
    if "other_weights" in stats:
        valid, count = _rows_with_negatives(stats)
        sums = jnp.where(valid, stats["other_weights"], 1)
        others = stats["best_other"] + jnp.log(jnp.where(valid, stats["others"], 1))
        terms = others - stats["other_weighted_logits"] / sums
        losses["negatives"] = jnp.where(valid, terms, 0).sum() / count
    return losses


def _rows_with_negatives(stats: Stats) -> tuple[Array, Array]:
    """Returns which rows have targets among their negatives, and their number (at least 1)."""
    valid = (stats["other_weights"] > 0) & (stats["others"] > 0)
    return valid, jnp.maximum(valid.sum(), 1)


@jax.custom_jvp
def once_differentiable(residuals):
    """Returns its argument; differentiating it is an error, as backward rules have no gradient."""
    return residuals


@once_differentiable.defjvp
def _no_second_derivative(primals, tangents):
    raise TypeError(NO_FORWARD_MODE)


def values_of(extras: dict[str, Any]) -> Side:
    """Returns the plain arrays that a forward rule receives with `symbolic_zeros`."""
    return {name: x.value for name, x in extras.items()}


_KEPT = ("max", "sum", "weights", "best_other", "others", "other_weights")


def _forward_rule(tiling, engine, epsilon, u, v, scale, extras):
    values = values_of(extras)
    outputs: Any = pair_losses(tiling, engine, epsilon, u.value, v.value, scale.value, values)
    stats = outputs[1]
    alone = tiling.negatives_alone
    names = _KEPT if alone else _KEPT[:3]
    kept = {side: {k: x for k, x in stats[side].items() if k in names} for side in stats}
    # None or () instead of a bool: residuals are arrays, but their structure is static.
    needed = {
        name: () if x.perturbed else None for name, x in (("u", u), ("v", v), ("scale", scale))
    }
    kept = once_differentiable(kept)
    return outputs, (u.value, v.value, scale.value, values, kept, needed)


def _factors(stats, cotangents: dict[str, Array], epsilon: float, deficit: Array | None) -> Stats:
    """Returns a and e (or c and f) of the equation in `sweeps`, for one side's cotangents."""
    factors, softmax = {}, []
    if "own" in cotangents:
        softmax.append(cotangents["own"] / stats["sum"])
    if "closed" in cotangents:
        assert deficit is not None
        softmax.append(cotangents["closed"] / stats["sum"] * (1 + deficit))
    if "soft" in cotangents:
        share = cotangents["soft"] / (stats["weights"] + epsilon)
        weight = stats["weights"] / (stats["weights"] + epsilon)
        softmax.append(cotangents["soft"] / stats["sum"] * weight)
        factors["weights"] = share
    if softmax:
        factors |= {"max": stats["max"], "softmax": sum(softmax[1:], start=softmax[0])}
    if "negatives" in cotangents:
        valid, count = _rows_with_negatives(stats)
        share = cotangents["negatives"] * (valid.shape[0] / count)
        # A row without negatives has no best negative; its factors are 0.
        factors["best_other"] = jnp.maximum(
            stats["best_other"], jnp.finfo(stats["best_other"].dtype).min
        )
        for name in ("others", "other_weights"):
            factors[name] = jnp.where(valid, share / jnp.where(valid, stats[name], 1), 0)
    return factors


def _given(parts: Parts) -> dict[str, dict[str, Array]]:
    """Returns the cotangents that are not known to be zero."""
    return {
        side: {k: g for k, g in by_name.items() if not isinstance(g, SymbolicZero)}
        for side, by_name in parts.items()
    }


def _backward_rule(tiling, engine, epsilon, residuals, cotangents):
    u, v, scale, extras, stats, needed = residuals
    given = _given(cotangents[0])
    need = {name: x is not None for name, x in needed.items()}
    every = [g for by_name in given.values() for g in by_name.values()]
    if not every or not any(need.values()):
        return None, None, None, None
    # Gradients of narrow dtypes must not underflow: tiles get cotangents of size 1, without 1/N.
    size = jnp.maximum(jnp.max(jnp.stack([jnp.abs(g) for g in every])), jnp.finfo(wide(u)).tiny)
    given = jax.tree.map(lambda g: g / size, given)
    rows, columns, scalars = sides_of(u, v, scale, extras)
    zero = jnp.zeros((), wide(u))
    scalars["own"] = sum(
        (by_name[k] for by_name in given.values() for k in ("own", "closed") if k in by_name),
        start=zero,
    )
    # the gradient of the scale can be computed from either side
    need_v = need["v"] or not need["u"]
    factors = [
        _factors(stats[side], given[side], epsilon, _deficit(extras, side))
        for side in ("rows", "columns")
    ]
    du, dv = engine.backward(tiling, rows, columns, scalars, *factors, (need["u"], need_v))
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
    """Returns what changes positive-pair targets to constant + slope <p_i, p_j> + own [i = j].

    These are the weights w_ij.

    With r_i = sum_j w_ij = N constant + slope p_i . S_p + own, S_p = sum_j p_j,

        L(U->V) = L_own + s mean_i <u_i, v_i - sum_j w_ij v_j / r_i>
        sum_ij w_ij <u_i, v_j> / r_i = sum_j <v_j, y_j>,   U' = U / r by rows,
        y_j = constant sum_i u'_i + own u'_j + slope p_j (sum_i p_i u'_i^T)

    and the same with <u_i, v_j> / r_j for V->U. y depends only on u and p, so its two products of
    O(N d k) are also the gradient for v: if u and p are constant, no others are needed. Sums are in
    float32 or wider at the highest matmul precision. The gradient is plain autodiff, also through p
    if it is not detached.

    Returns:
      The correction to add, (), and the row sums of the weights, (n,).
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
