"""From a `LossConfig` and arrays to the loss: chooses targets, tiles or closed form, and engine."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cwcl_jax.losses import diagnostics, reference, weights
from cwcl_jax.losses.fused import Engine, OneDevice, closed_form_correction, pair_losses
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.losses.reference import wide
from cwcl_jax.losses.tiles import Tiling
from cwcl_jax.losses.weights import WeightFunction


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """Weights constant + slope cos + own [i = j]."""

    constant: float
    slope: float
    own: float


@dataclasses.dataclass
class Inputs:
    """Arrays of one call, checked."""

    u: Float[Array, "n d"]
    v: Float[Array, "n d"]
    logit_scale: Float[Array, ""]
    p: Array | None = None
    labels: Array | None = None
    targets: Float[Array, "n n"] | None = None


def source_of_weights(config: LossConfig, inputs: Inputs, function: WeightFunction | None) -> str:
    """Where weights come from: "none", "cosine", "constant", "labels" or "targets"."""
    if len(inputs.u) == 1:
        return "none"  # one pair is its own only target, whatever its weight
    if config.name == "contrastive":
        return "labels" if config.duplicates == "positives" else "none"
    if inputs.targets is not None:
        return "targets"
    if function is not None:
        return "cosine"
    return {"uniform": "constant", "labels": "labels"}.get(config.weight_function, "cosine")


def closed_form(config: LossConfig, source: str, function: WeightFunction | None):
    """The closed form of the weights, or None if they must be made tile by tile."""
    if config.duplicates != "negatives":
        return None
    if source == "constant":
        c = config.weight_offdiagonal
        return ClosedForm(constant=c, slope=0.0, own=1 - c)
    if source == "cosine" and function is weights.affine:
        return ClosedForm(constant=0.5, slope=0.5, own=0.0)
    return None


def weight_extremes(
    config: LossConfig, inputs: Inputs, function: WeightFunction | None
) -> Float[Array, " 3"]:
    """The smallest weight, row sum and column sum, inf for a direction without weights."""
    source = source_of_weights(config, inputs, function)
    matrix, masked = dense_weights(config, inputs, source, function)
    if masked is not None:
        matrix = jnp.where(masked, 0, matrix)
    sums = [
        jnp.inf if config.weighted == without else matrix.sum(axis).min()
        for axis, without in ((1, "v_to_u"), (0, "u_to_v"))
    ]
    return lax.stop_gradient(jnp.stack([matrix.min(), *sums]))


def weighted_loss(
    config: LossConfig, inputs: Inputs, engine: Engine, function: WeightFunction | None = None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss and its diagnostics, tiled.

    Args:
      config: resolved options.
      inputs: checked arrays.
      engine: where the sweeps run.
      function: the caller's own weight function, in place of the configured one.
    """
    source = source_of_weights(config, inputs, function)
    function = function or weights.elementwise(config)
    p = prepared_embeds(config, inputs.p) if source == "cosine" else None
    closed = closed_form(config, source, function)
    scale = jnp.exp(inputs.logit_scale.astype(wide(inputs.u)))
    extras = {}
    if closed is None and p is not None:
        assert function is not None
        p = lax.stop_gradient(p)
        extras |= {"p": p, "sharpness": sharpness(config, function, p, inputs.labels, engine)}
    if closed is None and inputs.labels is not None:
        extras["labels"] = inputs.labels
    if source == "targets":
        extras["targets"] = lax.stop_gradient(inputs.targets)
    tiling = make_tiling(config, "none" if closed else source, function)
    terms = _closed_terms(config, closed, inputs, p, scale) if closed else {}
    for name, (_, deficit) in terms.items():
        if config.row_sum_epsilon:
            extras[f"{name}_deficit"] = lax.stop_gradient(deficit)
    outputs: Any = pair_losses(
        tiling, engine, config.row_sum_epsilon, inputs.u, inputs.v, scale, extras
    )
    u_to_v, v_to_u, stats = outputs
    losses = {"rows": u_to_v, "columns": v_to_u}
    for name, (correction, deficit) in terms.items():
        losses[name] += correction
        if config.row_sum_epsilon and not config.detach_weights:
            # `pair_losses` takes the deficit as constant; its own gradient is the log-sum-exp's.
            log_sum_exp = stats[name]["max"] + jnp.log(stats[name]["sum"])
            change = deficit - lax.stop_gradient(deficit)  # 0
            losses[name] += (change * lax.stop_gradient(log_sum_exp)).mean()
    loss = combine(config, losses["rows"], losses["columns"])
    reported = diagnostics.collect(
        config, source, closed, losses, stats, p, scale, engine, function
    )
    return loss, {"loss": loss} | reported


def prepared_embeds(config: LossConfig, p: Any) -> Array:
    """Locked embeds as the weights use them."""
    prepared: Any = weights.channel_profiles(p) if p.ndim == 3 else p
    if config.weight_function == "centred":
        prepared = weights.centre(prepared)
    if not config.detach_weights:
        return prepared
    detached: Array = lax.stop_gradient(prepared)
    return detached


def sharpness(
    config: LossConfig, function: WeightFunction, p: Array, labels: Array | None, engine: Engine
) -> Array:
    """The fixed or calibrated sharpness of the weight function."""
    fixed = weights.fixed_sharpness(config)
    if fixed is not None:
        return jnp.asarray(fixed, wide(p))

    def solve(own, cosines, duplicates, sum_over_columns):
        return weights.calibrate(function, own, cosines, config, duplicates, sum_over_columns)

    return engine.sampled(p, labels, weights.sample_stride(p.shape[0], config), solve)


def make_tiling(config: LossConfig, source: str, function: WeightFunction | None) -> Tiling:
    """Static facts of the sweeps."""
    return Tiling(
        source=source,
        function=function if source == "cosine" else None,
        offdiagonal=config.weight_offdiagonal,
        rows_weighted=source != "none" and config.weighted != "v_to_u",
        columns_weighted=source != "none" and config.weighted != "u_to_v",
        duplicates=config.duplicates,
        diagnostics=config.diagnostics,
        block_size=config.block_size,
        block_columns=config.block_columns,
        precision=config.precision,
    )


def _closed_terms(config, closed, inputs, p, scale) -> dict[str, tuple[Array, Array]]:
    """Correction and deficit, -epsilon / (row sum + epsilon), of each weighted direction."""
    terms = {}
    for name, direction in (("rows", "u_to_v"), ("columns", "v_to_u")):
        if config.weighted not in (direction, "both"):
            continue
        correction, sums = closed_form_correction(
            inputs.u,
            inputs.v,
            p,
            scale,
            constant=closed.constant,
            slope=closed.slope,
            own=closed.own,
            epsilon=config.row_sum_epsilon,
            direction=direction,
        )
        terms[name] = (correction, -config.row_sum_epsilon / (sums + config.row_sum_epsilon))
    return terms


def combine(config: LossConfig, u_to_v: Array, v_to_u: Array) -> Array:
    """The two directions' sum or mean."""
    if config.direction == "u_to_v":
        return u_to_v
    if config.direction == "v_to_u":
        return v_to_u
    total = u_to_v + config.reverse_weight * v_to_u
    return total / (1 + config.reverse_weight) if config.reduction == "mean" else total


def dense_loss(
    config: LossConfig, inputs: Inputs, function: WeightFunction | None = None
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The same by the equations: N x N arrays, any derivative."""
    source = source_of_weights(config, inputs, function)
    matrix, masked = dense_weights(config, inputs, source, function)
    u_to_v, v_to_u = reference.weighted(
        inputs.u,
        inputs.v,
        inputs.logit_scale,
        weights=matrix,
        weighted_directions=config.weighted,
        epsilon=config.row_sum_epsilon if source != "none" else 0.0,
        masked=masked,
    )
    loss = combine(config, u_to_v, v_to_u)
    reported = diagnostics.collect_dense(config, inputs, matrix, masked, (u_to_v, v_to_u))
    return loss, {"loss": loss} | reported


def dense_weights(
    config: LossConfig, inputs: Inputs, source: str, function: WeightFunction | None
) -> tuple[Float[Array, "n n"], Array | None]:
    """The N x N weights, and the pairs left out."""
    n, dtype = len(inputs.u), wide(inputs.u)
    own = jnp.eye(n, dtype=bool)
    same = own
    if inputs.labels is not None:
        same = inputs.labels[:, None] == inputs.labels[None, :]
    matrix = _dense_by_source(config, inputs, source, function, own, same).astype(dtype)
    if config.detach_weights:
        matrix = lax.stop_gradient(matrix)
    if config.duplicates == "positives" and source != "none":
        matrix = jnp.where(same, jnp.ones((), dtype), matrix)
    masked = same & ~own if config.duplicates == "masked" else None
    return matrix, masked


def _dense_by_source(config, inputs, source, function, own, same) -> Array:
    match source:
        case "none":
            return own
        case "targets":
            return inputs.targets
        case "labels":
            return same
        case "constant":
            return jnp.where(own, 1.0, config.weight_offdiagonal)
    function = function or weights.elementwise(config)
    assert function is not None
    p = prepared_embeds(config, inputs.p)
    sharp = sharpness(config, function, lax.stop_gradient(p), inputs.labels, OneDevice())
    matrix = weights.weight_matrix(function, p, sharp)
    return jnp.where(own, 1.0, matrix) if function is weights.exponential else matrix
