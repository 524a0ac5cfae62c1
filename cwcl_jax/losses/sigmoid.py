"""The sigmoid loss of SigLIP (Zhai et al., arXiv 2303.15343), tiled, on one device or a mesh.

    L = -1/N sum_ij log sigmoid(z_ij (s <u_i, v_j> + bias)),   z = 1 for positives, else -1

A further baseline: it needs no log-sum-exp and no second pass over the columns.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cwcl_jax.losses import reference
from cwcl_jax.losses.diagnostics import accuracy
from cwcl_jax.losses.fused import Engine, once_differentiable, values_of
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.losses.pairwise import Inputs
from cwcl_jax.losses.reference import wide
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
    """The loss and statistics of rows and columns; reverse mode in u, v, scale and bias."""
    row_stats, column_stats = engine.forward(tiling, *_sides(u, v, scale, bias, extras))
    return row_stats["loss"].mean(), {"rows": row_stats, "columns": column_stats}


def _sides(u, v, scale, bias, extras) -> tuple[Side, Side, Stats]:
    scalars = {"scale": scale, "bias": bias, "first_column": jnp.zeros((), jnp.int32)}
    return {"x": u} | extras, {"x": v} | extras, scalars


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


def sigmoid_pairs(
    config: LossConfig, inputs: Inputs, bias: Array, engine: Engine
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss and its diagnostics, in the configured form."""
    scale = jnp.exp(inputs.logit_scale)
    tiling = Tiling(
        kind="sigmoid",
        duplicates=config.duplicates,
        diagnostics=config.diagnostics,
        block_size=config.block_size,
        block_columns=config.block_columns,
        precision=config.precision,
    )
    extras = {} if inputs.labels is None else {"labels": inputs.labels}
    if config.form == "dense":
        loss = _dense(config, inputs, bias)
        u, v = lax.stop_gradient((inputs.u, inputs.v))
        rows, columns = engine.forward(tiling, *_sides(u, v, scale, bias, extras))
    else:
        outputs: Any = pair_loss(tiling, engine, inputs.u, inputs.v, scale, bias, extras)
        loss, rows, columns = outputs[0], outputs[1]["rows"], outputs[1]["columns"]
    out = {"loss": loss, "inverse_temperature": scale, "logit_bias": bias}
    if config.diagnostics:
        out["accuracy_u_to_v"] = accuracy(rows)
        out["accuracy_v_to_u"] = accuracy(columns)
    return loss, jax.tree.map(lax.stop_gradient, out)


def _dense(config: LossConfig, inputs: Inputs, bias: Array) -> Array:
    own = jnp.eye(len(inputs.u), dtype=bool)
    positives, masked = own, None
    if inputs.labels is not None:
        same = inputs.labels[:, None] == inputs.labels[None, :]
        positives = own | same if config.duplicates == "positives" else own
        masked = same & ~own if config.duplicates == "masked" else None
    return reference.sigmoid(
        inputs.u, inputs.v, inputs.logit_scale, bias, positives=positives, masked=masked
    )
