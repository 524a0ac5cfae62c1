"""Scalars that show training progress where the loss value does not.

CWCL's targets are close to uniform, so L_CWCL has a floor of about log N that grows with the batch.
The excess over the target entropy is the KL divergence from targets to predictions, which can reach
zero; exp(entropy) is the effective number of positives. For sigmoid losses, the excess is the
difference to the smallest loss that the targets allow, and entropies are computed from the
normalised rows of the weights.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cwcl_jax.losses import weights
from cwcl_jax.losses.tiles import Stats
from cwcl_jax.losses.weights import xlogx

_NAMES = (("rows", "u_to_v"), ("columns", "v_to_u"))


def of_softmax(
    frame, inputs, closed, tiling, losses, stats, rows, scale, engine
) -> dict[str, Array]:
    """Returns the scalars of one call of the tiled loss, by name."""
    out = {f"loss_{name}": losses[side] for side, name in _NAMES}
    out["inverse_temperature"] = scale
    if not frame.config.diagnostics:
        return out
    for side, name in _NAMES:
        out[f"accuracy_{name}"] = accuracy(stats[side])
    n = stats["rows"]["own"].shape[0]
    sides = weighted_sides(frame)
    if closed is not None:
        per_side = [_from_closed_form(frame, closed, rows, side, n, engine) for side in sides]
        if frame.weighted == "both":
            per_side = per_side[:1]  # both sides have the same similarities
    elif tiling.source == "none":
        one = jnp.ones((), scale.dtype)
        sides, per_side = ["rows"], [(one, 0 * one, one, 0 * one)]
    else:
        per_side = [_from_stats(stats[side]) for side in sides]
    out |= _targets(inputs.mix, per_side, [losses[side] for side in sides], n)
    return out | {"masked_share": masked_share(stats)}


def weighted_sides(frame) -> list[str]:
    """Returns the sides whose targets are weighted."""
    return [side for side, name in _NAMES if frame.weighted in (name, "both", "own")]


def accuracy(stats: Stats) -> Array:
    """Returns the share of rows whose positive pair has the largest logit; ties count as wrong."""
    return (stats["own"] > stats["best_other"]).astype(stats["own"].dtype).mean()


def masked_share(stats: dict[str, Stats]) -> Array:
    """Returns the share of all other pairs that the softmaxes leave out."""
    n = stats["rows"]["own"].shape[0]
    if "masked" not in stats["rows"]:
        return jnp.zeros((), stats["rows"]["own"].dtype)
    return (stats["rows"]["masked"] + stats["columns"]["masked"]).mean() / 2 / max(n - 1, 1)


def _targets(mix, per_side, losses, n: int) -> dict[str, Array]:
    """Returns the target statistics, averaged over sides.

    Each side is (sum, sum of w log w, own weight, sum of other weights), by rows.
    """
    figures = [_of_mixture(mix, *side) for side in per_side]
    entropy, own_share = (sum(x) / len(figures) for x in zip(*figures, strict=True))
    other = sum((side[3]).mean() for side in per_side) / len(per_side) / max(n - 1, 1)
    return summarise(entropy, sum(losses) / len(losses), own_share, other)


def _of_mixture(mix, sums, logs, own, others) -> tuple[Array, Array]:
    """Returns mean entropy and mean positive share of mix [i = j] + (1 - mix) w_ij / sum_j w_ij."""
    if isinstance(mix, float) and mix == 0:
        return (jnp.log(sums) - logs / sums).mean(), (own / sums).mean()
    rest = 1 - mix
    share = mix + rest * own / sums
    log_rest = jnp.log(jnp.where(rest > 0, rest, 1)) - jnp.log(sums)
    entropy = -xlogx(share) - rest / sums * (others * log_rest + logs - xlogx(own))
    return entropy.mean(), share.mean()


def summarise(entropy, weighted_loss, own_share, other_weight) -> dict[str, Array]:
    """Returns the target statistics by name (means over the weighted directions)."""
    return {
        "target_entropy": entropy,
        "excess": weighted_loss - entropy,
        "effective_positives": jnp.exp(entropy),
        "diagonal_weight": own_share,
        "offdiagonal_weight": other_weight,
    }


def _from_stats(stats: Stats) -> tuple[Array, Array, Array, Array]:
    sums, own = stats["weights"], stats["own_weight"]
    return sums, stats["weights_log"], own, sums - own


def _from_closed_form(frame, closed, rows, side, n, engine) -> tuple[Array, Array, Array, Array]:
    """Returns the same four: estimated from sampled rows, or exact for constant weights."""
    if not closed.slope:
        c = closed.constant
        row = jnp.full(n, c).at[0].add(closed.own)
        return row.sum(), xlogx(row).sum(), row[0], row.sum() - row[0]

    def body(own, cosines, _, sum_over_columns):
        matrix = closed.constant + closed.slope * cosines
        sums = sum_over_columns(matrix.sum(axis=1))
        logs = sum_over_columns(xlogx(matrix).sum(axis=1))
        own_weight = closed.constant + closed.slope * own + closed.own
        return sums, logs, own_weight, sums - own_weight

    of = "q" if side == "columns" and frame.weighted == "own" else "p"
    p = lax.stop_gradient(rows[of])
    return engine.sampled(p, None, weights.sample_stride(n), body)


def of_sigmoid(frame, loss, stats, scale, bias) -> dict[str, Array]:
    """Returns the scalars of one call of a sigmoid loss."""
    out = {"inverse_temperature": scale, "logit_bias": bias}
    if not frame.config.diagnostics:
        return out
    for side, name in _NAMES:
        out[f"accuracy_{name}"] = accuracy(stats[side])
    rows = stats["rows"]
    n = rows["own"].shape[0]
    if "weights" in rows:
        out |= _targets(0.0, [_from_stats(rows)], [loss], n)
        out["excess"] = loss - rows["least"].mean()
    else:
        one = jnp.ones((), scale.dtype)
        out |= summarise(0 * one, loss, one, 0 * one)
    return out | {"masked_share": masked_share(stats)}


def of_nothing(scale) -> dict[str, Array]:
    """Returns the scalars of a loss of further terms alone; its targets are the positive pairs."""
    one = jnp.ones((), scale.dtype)
    return {"inverse_temperature": scale, "effective_positives": one, "masked_share": 0 * one}


def of_dense(frame, found, scale, mix) -> dict[str, Any]:
    """Returns the scalars of `of_softmax` from N x N arrays; `mix` is the positive pair's share."""
    out = {f"loss_{name}": found[side].loss for side, name in _NAMES}
    out["inverse_temperature"] = scale
    if not frame.config.diagnostics:
        return out
    n = len(found["rows"].logits)
    own = jnp.eye(n, dtype=bool)
    for side, name in _NAMES:
        logits = found[side].logits
        right = jnp.diagonal(logits) > jnp.where(own, -jnp.inf, logits).max(axis=1)
        out[f"accuracy_{name}"] = right.astype(logits.dtype).mean()
    chosen = [found[side] for side in weighted_sides(frame) if found[side].weights is not None]
    chosen = chosen or [found["rows"]]
    figures = []
    for x in chosen:
        # As in the tiled forms, a preset's epsilon does not enter these statistics.
        targets = x.targets
        if x.weights is not None:
            targets = mix * own + (1 - mix) * x.weights / x.weights.sum(axis=1, keepdims=True)
        targets = targets / targets.sum(axis=1, keepdims=True)
        other = 0.0 if x.weights is None else jnp.where(own, 0, x.weights).sum() / max(n * n - n, 1)
        figures.append((-xlogx(targets).sum(axis=1).mean(), jnp.diagonal(targets).mean(), other))
    entropy, own_share, other = (sum(x) / len(figures) for x in zip(*figures, strict=True))
    out |= summarise(entropy, sum(x.loss for x in chosen) / len(chosen), own_share, other)
    masked = sum(x.masked.astype(x.logits.dtype).mean() for x in found.values()) * (
        n / max(n - 1, 1) / 2
    )
    return out | {"masked_share": masked}
