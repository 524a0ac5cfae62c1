"""The equations of `cwcl_jax.losses.presets`, dense and line by line.

Every other form is tested against this definition, which is also form="dense" itself. It takes any
float dtype, builds N x N arrays, and supports both differentiation modes, also through the weights.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from cwcl_jax.losses import labels, terms, weights
from cwcl_jax.losses.inputs import Inputs, sharpness
from cwcl_jax.losses.numerics import Scalar, inner, wide
from cwcl_jax.losses.options import Frame


@dataclasses.dataclass
class Direction:
    """One softmax direction. For V->U all is transposed, so that softmax runs over rows.

    Attributes:
      logits: -inf at masked pairs.
      targets: t_ij.
      weights: w_ij, 0 at masked pairs; None without weights.
      masked: pairs that are left out.
      loss: L of this direction.
      negatives: the direction's term "negatives", 0 if it is not part of the loss.
    """

    logits: Float[Array, "n n"]
    targets: Float[Array, "n n"]
    weights: Float[Array, "n n"] | None
    masked: Bool[Array, "n n"]
    loss: Float[Array, ""]
    negatives: Float[Array, ""]


def pair_logits(
    u: Float[Array, "n d"], v: Float[Array, "n d"], logit_scale: Scalar
) -> Float[Array, "n n"]:
    """Returns the logits s <u_i, v_j>."""
    return jnp.exp(jnp.asarray(logit_scale, wide(u))) * inner(u, v)


def cross_entropy(logits: Float[Array, "n n"], targets: Float[Array, "n n"]) -> Float[Array, " n"]:
    """Returns -sum_j t_ij log softmax_j(logits_ij) for each row."""
    log_probabilities = jax.nn.log_softmax(logits, axis=1)
    # A zero target may meet a logit of -inf (a masked pair), and 0 * inf is NaN.
    zero = targets == 0
    return -jnp.where(zero, 0.0, targets * jnp.where(zero, 0.0, log_probabilities)).sum(axis=1)


def negatives_alone(logits: Float[Array, "n n"], matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """Returns the softmax loss over the negatives alone.

    It is averaged over the rows that have targets among their negatives.
    """
    own = jnp.eye(len(logits), dtype=bool)
    matrix = jnp.where(own, 0, matrix)
    sums = matrix.sum(axis=1)
    valid = sums > 0
    targets = matrix / jnp.where(valid, sums, 1)[:, None]
    # Rows without targets keep a finite logit, so that no gradient is undefined.
    logits = jnp.where(own & valid[:, None], -jnp.inf, logits)
    return cross_entropy(logits, targets).sum() / jnp.maximum(valid.sum(), 1)


def weight_matrix(frame: Frame, inputs: Inputs, features: Array | None) -> Array | None:
    """Returns w_ij from one modality's features, duplicates as positives included, or None."""
    n, dtype = len(inputs.u), wide(inputs.u)
    own = jnp.eye(n, dtype=bool)
    matrix = _weights_by_name(frame, inputs, features, own)
    if matrix is None:
        return None
    matrix = matrix.astype(dtype)
    if frame.detach_weights:
        matrix = jax.lax.stop_gradient(matrix)
    if frame.duplicates == "positives":
        assert inputs.labels is not None
        matrix = jnp.where(labels.same_labels(inputs.labels, inputs.labels), 1.0, matrix)
    return matrix


def _weights_by_name(frame: Frame, inputs: Inputs, features: Array | None, own: Array):
    chosen = frame.weights
    if inputs.targets is not None:
        return inputs.targets
    if chosen.name == "identity" or len(own) == 1:
        return None
    if chosen.name == "uniform":
        return jnp.where(own, 1.0, chosen.numbers[0])
    if chosen.name == "labels":
        assert inputs.labels is not None
        matrix = labels.label_weights(
            inputs.labels, inputs.labels, chosen.numbers[0], wide(inputs.u)
        )
        return jnp.where(own, 1.0, matrix)
    assert features is not None
    rows = weights.prepared(chosen, features, detach=frame.detach_weights)
    similarity = inner(rows, rows)
    if chosen.name == "distance":
        squares = jnp.square(rows).sum(axis=1)
        similarity = jnp.maximum(squares[:, None] + squares[None, :] - 2 * similarity, 0)
    sharp = sharpness(frame, jax.lax.stop_gradient(rows), inputs.labels)
    matrix = chosen.function()(similarity, sharp)
    # Identical features: their own weight is 1, whatever rounding makes of their norm.
    exact = chosen.name in ("exp", "calibrated", "distance")
    return jnp.where(own, 1.0, matrix) if exact else matrix


def masked_pairs(frame: Frame, inputs: Inputs) -> Bool[Array, "n n"]:
    """Returns the pairs that each row leaves out."""
    own = jnp.eye(len(inputs.u), dtype=bool)
    if frame.duplicates == "masked":
        assert inputs.labels is not None
        return labels.same_labels(inputs.labels, inputs.labels) & ~own
    if not frame.guided:
        return jnp.zeros_like(own)
    assert inputs.p is not None
    guide = weights.prepared(frame.weights, inputs.p, detach=True)
    limits = weights.guide_limits(guide, frame.duplicates, frame.margin)
    return (inner(guide, guide) > limits[:, None]) & ~own


def directions(frame: Frame, inputs: Inputs) -> dict[str, Direction]:
    """Returns both softmax directions by their equations, "rows" (U->V) and "columns" (V->U)."""
    logits = pair_logits(inputs.u, inputs.v, inputs.logit_scale)
    masked = masked_pairs(frame, inputs)
    own = jnp.eye(len(logits), dtype=logits.dtype)
    found = {}
    for side, name, features in _sides(frame, inputs):
        turned = logits if side == "rows" else logits.T
        matrix = None
        if frame.weighted in (name, "both", "own"):
            matrix = weight_matrix(frame, inputs, features)
        if matrix is not None and side == "columns":
            matrix = matrix.T
        found[side] = _direction(frame, inputs, turned, matrix, masked, own)
    return found


def _sides(frame: Frame, inputs: Inputs):
    q = inputs.q if frame.weighted == "own" else inputs.p
    return (("rows", "u_to_v", inputs.p), ("columns", "v_to_u", q))


def _direction(frame, inputs, logits, matrix, masked, own) -> Direction:
    logits = jnp.where(masked, -jnp.inf, logits)
    targets, negatives = own, jnp.zeros((), logits.dtype)
    if matrix is not None:
        matrix = jnp.where(masked, 0, matrix)
        soft = matrix / (matrix.sum(axis=1, keepdims=True) + frame.row_sum_epsilon)
        targets = inputs.mix * own + (1 - inputs.mix) * soft
        if "negatives" in frame.terms:
            negatives = negatives_alone(logits, matrix)
    loss = cross_entropy(logits, targets).mean()
    return Direction(logits, targets, matrix, masked, loss, negatives)


def sigmoid_targets(frame: Frame, inputs: Inputs) -> tuple[Array, Array]:
    """Returns t_ij of the sigmoid losses, and the mask of the pairs that are left out."""
    own = jnp.eye(len(inputs.u), dtype=wide(inputs.u))
    matrix = weight_matrix(frame, inputs, inputs.p)
    targets = own if matrix is None else inputs.mix * own + (1 - inputs.mix) * matrix
    return targets, masked_pairs(frame, inputs)


def sigmoid(frame: Frame, inputs: Inputs) -> Float[Array, ""]:
    """Returns 1/N sum_ij [t_ij log(1 + exp(-z_ij)) + (a - b t_ij) log(1 + exp(z_ij))]."""
    assert inputs.logit_bias is not None
    z = pair_logits(inputs.u, inputs.v, inputs.logit_scale) + inputs.logit_bias
    targets, masked = sigmoid_targets(frame, inputs)
    a, b = frame.negatives
    losses = targets * jax.nn.softplus(-z) + (a - b * targets) * jax.nn.softplus(z)
    return jnp.where(masked, 0, losses).sum(axis=1).mean()


def replicates(frame: Frame, inputs: Inputs) -> Float[Array, ""]:
    """Returns the term "replicates": u against u, positives by equal labels."""
    assert inputs.labels is not None
    same = labels.same_labels(inputs.labels, inputs.labels)
    logits = pair_logits(inputs.u, inputs.u, inputs.logit_scale)
    return negatives_alone(logits, same.astype(logits.dtype))


def further_terms(frame: Frame, inputs: Inputs, found: dict[str, Direction]) -> dict[str, Array]:
    """Returns the values of the terms besides the two directions, without their factors."""
    values = terms.of_pairs(tuple(frame.terms), inputs.u, inputs.v)
    if "replicates" in frame.terms:
        values["replicates"] = replicates(frame, inputs)
    if "negatives" in frame.terms:
        factors = zip(found.values(), frame.direction_weights, strict=True)
        values["negatives"] = sum((f * x.negatives for x, f in factors), start=jnp.zeros(()))
    return values
