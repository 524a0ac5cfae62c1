"""The sigmoid losses of `cwcl_jax.losses.presets`, tiled, on one device or a mesh.

They need no log-sum-exp and no second pass over the columns.
"""

from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cwcl_jax.losses.engines import Engine
from cwcl_jax.losses.fused import once_differentiable, sides_of, values_of
from cwcl_jax.losses.numerics import wide
from cwcl_jax.losses.tiles import Side, Stats, Tiling


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def pair_loss(
    tiling: Tiling,
    engine: Engine,
    u: Float[Array, "n d"],
    v: Float[Array, "n d"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    extras: Side,
) -> tuple[Float[Array, ""], dict[str, Stats]]:
    """Returns the loss and the statistics of both sides; reverse mode in u, v, scale and bias."""
    row_stats, column_stats = engine.forward(tiling, *_sides(u, v, scale, bias, extras))
    return row_stats["loss"].mean(), {"rows": row_stats, "columns": column_stats}


def _sides(u, v, scale, bias, extras) -> tuple[Side, Side, Stats]:
    rows, columns, scalars = sides_of(u, v, scale, extras)
    return rows, columns, scalars | {"bias": bias}


def _forward_rule(tiling, engine, u, v, scale, bias, extras):
    extras = values_of(extras)
    outputs: Any = pair_loss(tiling, engine, u.value, v.value, scale.value, bias.value, extras)
    stats = outputs[1]
    bias_gradient = once_differentiable(stats["rows"]["bias_gradient"].mean())
    names = {"u": u, "v": v, "scale": scale}
    needed = {name: () if x.perturbed else None for name, x in names.items()}
    kept = (u.value, v.value, scale.value, bias.value, extras, bias_gradient, needed)
    return outputs, kept


def _backward_rule(tiling, engine, residuals, cotangents):
    u, v, scale, bias, extras, bias_gradient, needed = residuals
    g = cotangents[0]
    need = {name: x is not None for name, x in needed.items()}
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    d_bias = g * bias_gradient
    if not any(need.values()):
        return None, None, None, d_bias, None
    need_v = need["v"] or not need["u"]
    du, dv = engine.backward(
        tiling, *_sides(u, v, scale, bias, extras), {}, {}, (need["u"], need_v)
    )
    g = g / u.shape[0]
    x, dx = (v, dv) if dv is not None else (u, du)
    return (
        (du * (scale * g)).astype(u.dtype) if need["u"] else None,
        (dv * (scale * g)).astype(v.dtype) if need["v"] else None,
        (x.astype(wide(x)) * dx).sum() * g if need["scale"] else None,
        d_bias,
        None,
    )


pair_loss.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)
