"""Computes the loss of a `Frame`: tiles or closed form, both directions, further terms."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cwcl_jax.losses import diagnostics, reference, terms, weights
from cwcl_jax.losses.engines import Engine
from cwcl_jax.losses.fused import closed_form_correction, pair_losses
from cwcl_jax.losses.inputs import Inputs, sharpness
from cwcl_jax.losses.numerics import wide
from cwcl_jax.losses.options import Frame
from cwcl_jax.losses.sigmoid import pair_loss
from cwcl_jax.losses.tiles import Side, Tiling

Result = tuple[Float[Array, ""], dict[str, Array]]
# Side of the sweeps, and its name in diagnostics, in the order of `direction_weights`.
SIDES = (("rows", "u_to_v"), ("columns", "v_to_u"))


@dataclasses.dataclass(frozen=True)
class ClosedForm:
    """Weights constant + slope cos + own [i = j]."""

    constant: float
    slope: float
    own: float


def closed_form(frame: Frame, inputs: Inputs) -> ClosedForm | None:
    """Returns the closed form of the weights, or None if they must be computed tile by tile."""
    if not frame.closed or inputs.targets is not None or len(inputs.u) == 1:
        return None
    if frame.weights.name == "uniform":
        c = frame.weights.numbers[0]
        return ClosedForm(constant=c, slope=0.0, own=1 - c)
    return ClosedForm(constant=0.5, slope=0.5, own=0.0)


def source_of_weights(frame: Frame, inputs: Inputs) -> str:
    """Returns what a tile's weights are computed from; see `Tiling.source`."""
    if len(inputs.u) == 1:
        return "none"  # one pair is its own only target, with any weight
    if inputs.targets is not None:
        return "targets"
    named = {"identity": "none", "uniform": "constant", "labels": "labels", "distance": "distance"}
    return named.get(frame.weights.name, "cosine")


def loss_of_frame(frame: Frame, inputs: Inputs, engine: Engine) -> Result:
    """Returns the loss and its diagnostics: tiled, or by the equations if form="dense"."""
    dense = frame.config.form == "dense"
    scale = jnp.exp(inputs.logit_scale.astype(wide(inputs.u)))
    if frame.kind == "none":
        loss, reported = jnp.zeros((), wide(inputs.u)), diagnostics.of_nothing(scale)
        values = terms.of_pairs(tuple(frame.terms), inputs.u, inputs.v)
        if "replicates" in frame.terms:
            values["replicates"] = (
                reference.replicates(frame, inputs) if dense
                else _replicates(frame, inputs, scale, engine)
            )  # fmt: skip
    elif frame.kind == "sigmoid":
        loss, values, reported = _sigmoid(frame, inputs, scale, engine, dense=dense)
    else:
        loss, values, reported = (_dense if dense else _softmax)(frame, inputs, scale, engine)
    for name, factor in frame.terms.items():
        loss = loss + factor * values[name]
        reported[f"term_{name}"] = values[name]
    reported = {"loss": loss} | reported
    return loss, jax.tree.map(lax.stop_gradient, reported)


def _softmax(frame: Frame, inputs: Inputs, scale: Array, engine: Engine):
    closed = closed_form(frame, inputs)
    source = "none" if closed else source_of_weights(frame, inputs)
    rows = _prepared(frame, inputs)
    tiling = make_tiling(frame, source)
    extras = _extras(frame, inputs, tiling, rows, engine)
    corrections = _closed_terms(frame, closed, inputs, rows, scale) if closed else {}
    for side, (_, deficit) in corrections.items():
        if frame.row_sum_epsilon:
            extras[f"{side}_deficit"] = lax.stop_gradient(deficit)
    outputs: Any = pair_losses(
        tiling, engine, frame.row_sum_epsilon, inputs.u, inputs.v, scale, extras
    )
    parts, stats = outputs
    losses = {
        side: _of_direction(frame, inputs, parts[side], stats[side], corrections.get(side))
        for side, _ in SIDES
    }
    values = terms.of_pairs(tuple(frame.terms), inputs.u, inputs.v)
    if "replicates" in frame.terms:
        values["replicates"] = _replicates(frame, inputs, scale, engine)
    if "negatives" in frame.terms:
        values["negatives"] = sum(
            (
                factor * parts[side]["negatives"]
                for (side, _), factor in zip(SIDES, frame.direction_weights, strict=True)
                if "negatives" in parts[side]
            ),
            start=jnp.zeros((), scale.dtype),
        )
    reported = diagnostics.of_softmax(
        frame, inputs, closed, tiling, losses, stats, rows, scale, engine
    )
    return combine(frame, losses), values, reported


def combine(frame: Frame, losses: dict[str, Array]) -> Array:
    """Returns a L(U->V) + b L(V->U)."""
    a, b = frame.direction_weights
    if not b:
        return a * losses["rows"]
    if not a:
        return b * losses["columns"]
    return a * losses["rows"] + b * losses["columns"]


def _of_direction(frame: Frame, inputs: Inputs, parts, stats, correction) -> Array:
    """Returns one direction's loss: mix times the positive-pair part, plus the weighted rest."""
    if correction is not None:
        change, deficit = correction
        soft = parts.get("closed", parts["own"]) + change
        if frame.row_sum_epsilon and not frame.detach_weights:
            # `pair_losses` treats the deficit as constant; the gradient for it is the log-sum-exp.
            log_sum_exp = stats["max"] + jnp.log(stats["sum"])
            zero = deficit - lax.stop_gradient(deficit)
            soft += (zero * lax.stop_gradient(log_sum_exp)).mean()
    elif "soft" in parts:
        soft = parts["soft"]
    else:
        return parts["own"]
    if frame.mix == (0.0,):
        return soft
    return inputs.mix * parts["own"] + (1 - inputs.mix) * soft


def _prepared(frame: Frame, inputs: Inputs) -> dict[str, Array]:
    """Returns the features as weights and masks use them, by "p" and "q"."""
    found = {}
    own_weights = inputs.targets is None and len(inputs.u) > 1
    if frame.guided or (frame.needs_p and own_weights):
        assert inputs.p is not None
        found["p"] = weights.prepared(frame.weights, inputs.p, detach=frame.detach_weights)
    if frame.needs_q and own_weights:
        assert inputs.q is not None
        found["q"] = weights.prepared(frame.weights, inputs.q, detach=frame.detach_weights)
    return found


def _extras(frame: Frame, inputs: Inputs, tiling: Tiling, rows, engine: Engine) -> Side:
    """Returns the arrays that the sweeps need besides u and v; see `pair_losses`."""
    rows = {name: lax.stop_gradient(x) for name, x in rows.items()}
    extras: dict[str, Any] = {}
    of_features = tiling.source in ("cosine", "distance")
    for name, x in rows.items():
        if of_features or (tiling.guided and name == "p"):
            extras[name] = x
        if of_features:
            extras[f"sharpness_{name}"] = sharpness(frame, x, inputs.labels, engine)
        if tiling.source == "distance":
            extras[f"square_{name}"] = jnp.square(x).sum(axis=1)
    if tiling.guided:
        extras["limit"] = weights.guide_limits(rows["p"], frame.duplicates, frame.margin)
    if tiling.source == "labels" or tiling.duplicates in ("positives", "masked"):
        extras["labels"] = inputs.labels
    if tiling.source == "targets":
        extras["targets"] = lax.stop_gradient(inputs.targets)
    if tiling.mixes:
        extras["mix"] = jnp.asarray(inputs.mix, wide(inputs.u))
    return extras


def make_tiling(frame: Frame, source: str) -> Tiling:
    """Returns the static description of the sweeps."""
    chosen, config = frame.weights, frame.config
    weighted = {side: source != "none" and frame.weighted in (name, "both", "own")
                for side, name in SIDES}  # fmt: skip
    duplicates = frame.duplicates
    if duplicates == "positives" and source in ("none", "labels"):
        duplicates = "negatives"  # label weights already include duplicates; closed forms have none
    return Tiling(
        kind=frame.kind,
        source=source,
        function=chosen.function() if source in ("cosine", "distance") else None,
        number=chosen.numbers[0] if source in ("constant", "labels") else 1.0,
        two_sided=frame.weighted == "own" and source in ("cosine", "distance"),
        rows_weighted=weighted["rows"],
        columns_weighted=weighted["columns"],
        duplicates=duplicates,
        negatives_alone="negatives" in frame.terms and source != "none",
        negatives=frame.negatives,
        mixes=frame.kind == "sigmoid" and source != "none" and frame.mix != (0.0,),
        diagnostics=config.diagnostics,
        block_size=config.block_size,
        block_columns=config.block_columns,
        precision=config.precision,
    )


def _closed_terms(frame, closed, inputs, rows, scale) -> dict[str, tuple[Array, Array]]:
    """Returns correction and deficit, -epsilon / (row sum + epsilon), by weighted direction."""
    found, epsilon = {}, frame.row_sum_epsilon
    for side, direction in SIDES:
        if frame.weighted not in (direction, "both", "own"):
            continue
        of = "q" if side == "columns" and frame.weighted == "own" else "p"
        correction, sums = closed_form_correction(
            inputs.u,
            inputs.v,
            rows.get(of),
            scale,
            constant=closed.constant,
            slope=closed.slope,
            own=closed.own,
            epsilon=epsilon,
            direction=direction,
        )
        found[side] = (correction, -epsilon / (sums + epsilon))
    return found


def _replicates(frame: Frame, inputs: Inputs, scale: Array, engine: Engine) -> Array:
    """Returns the term "replicates": u against u, positives by equal labels."""
    if len(inputs.u) == 1:
        return jnp.zeros((), scale.dtype)
    config = frame.config
    tiling = Tiling(
        source="labels",
        number=0.0,
        rows_weighted=True,
        negatives_alone=True,
        diagnostics=False,
        block_size=config.block_size,
        block_columns=config.block_columns,
        precision=config.precision,
    )
    assert inputs.labels is not None
    outputs: Any = pair_losses(
        tiling, engine, 0.0, inputs.u, inputs.u, scale, {"labels": inputs.labels}
    )
    return outputs[0]["rows"]["negatives"]


def _sigmoid(frame: Frame, inputs: Inputs, scale: Array, engine: Engine, *, dense: bool):
    source = source_of_weights(frame, inputs)
    tiling = make_tiling(frame, source)
    extras = _extras(frame, inputs, tiling, _prepared(frame, inputs), engine)
    u, v, bias = inputs.u, inputs.v, inputs.logit_bias
    constant = lax.stop_gradient((u, v, scale, bias))
    outputs: Any = pair_loss(tiling, engine, *(constant if dense else (u, v, scale, bias)), extras)
    loss, stats = outputs
    if dense:
        loss = reference.sigmoid(frame, inputs)
    values = terms.of_pairs(tuple(frame.terms), u, v)
    if "replicates" in frame.terms:
        values["replicates"] = (
            reference.replicates(frame, inputs) if dense
            else _replicates(frame, inputs, scale, engine)
        )  # fmt: skip
    return loss, values, diagnostics.of_sigmoid(frame, loss, stats, scale, bias)


def _dense(frame: Frame, inputs: Inputs, scale: Array, engine: Engine):
    del engine
    found = reference.directions(frame, inputs)
    losses = {side: x.loss for side, x in found.items()}
    values = reference.further_terms(frame, inputs, found)
    return combine(frame, losses), values, diagnostics.of_dense(frame, found, scale, inputs.mix)


def weight_extremes(frame: Frame, inputs: Inputs) -> Float[Array, " 3"] | None:
    """Returns the smallest weight, row sum and column sum; inf for a direction without weights."""
    if frame.kind == "none" or (frame.weights.name == "identity" and inputs.targets is None):
        return None
    found = reference.directions(dataclasses.replace(frame, kind="softmax"), inputs)
    matrices = [x.weights for x in found.values()]
    smallest = jnp.stack([x.min() for x in matrices if x is not None])
    sums = [jnp.inf if x is None else x.sum(axis=1).min() for x in matrices]
    return lax.stop_gradient(jnp.stack([smallest.min(), *sums]))
