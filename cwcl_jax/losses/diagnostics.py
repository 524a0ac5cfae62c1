"""Numbers that tell how training goes where the loss's value does not.

CWCL's targets are close to uniform, so L_CWCL has a floor of about log N that grows with the batch.
The excess over the target entropy is the KL divergence from targets to predictions, which can reach
zero; exp(entropy) is the effective number of positives.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cwcl_jax.losses import weights
from cwcl_jax.losses.options import LossConfig
from cwcl_jax.losses.reference import pair_logits, soft_targets
from cwcl_jax.losses.tiles import Stats
from cwcl_jax.losses.weights import xlogx


def collect(
    config: LossConfig, source: str, closed, losses, stats, p, scale, engine, function
) -> dict[str, Array]:
    """Scalars of one call of the tiled loss; see the README for each name."""
    out = {
        "loss_u_to_v": losses["rows"],
        "loss_v_to_u": losses["columns"],
        "inverse_temperature": scale,
    }
    if config.diagnostics:
        for side, name in (("rows", "u_to_v"), ("columns", "v_to_u")):
            out[f"accuracy_{name}"] = accuracy(stats[side])
        out |= _targets(config, source, closed, losses, stats, p, engine, function)
    return jax.tree.map(lax.stop_gradient, out)


def accuracy(stats: Stats) -> Array:
    """Share of rows whose own pair has the single largest logit; a tie counts as wrong."""
    return (stats["own"] > stats["best_other"]).astype(stats["own"].dtype).mean()


def _targets(config, source, closed, losses, stats, p, engine, function) -> dict[str, Array]:
    sides = [
        side
        for side, without in (("rows", "v_to_u"), ("columns", "u_to_v"))
        if config.weighted != without
    ]
    n = stats["rows"]["own"].shape[0]
    if source == "none":
        one = jnp.ones((), losses["rows"].dtype)
        return summarise(0 * one, losses["rows"], one, 0 * one)
    if closed is None:
        per_side = [_from_stats(stats[side], n) for side in sides]
    else:
        per_side = [_from_closed_form(config, closed, p, n, engine, losses["rows"].dtype)]
    entropy, own_share, other = (sum(x) / len(per_side) for x in zip(*per_side, strict=True))
    weighted_loss = sum(losses[side] for side in sides) / len(sides)
    return summarise(entropy, weighted_loss, own_share, other)


def summarise(entropy, weighted_loss, own_share, other_weight) -> dict[str, Array]:
    """Names of the figures about the targets (means over the weighted directions)."""
    return {
        "target_entropy": entropy,
        "excess": weighted_loss - entropy,
        "effective_positives": jnp.exp(entropy),
        "diagonal_weight": own_share,
        "offdiagonal_weight": other_weight,
    }


def _from_stats(stats: Stats, n: int) -> tuple[Array, Array, Array]:
    """Mean entropy, mean own share and mean weight of other pairs, from exact sums."""
    sums = stats["weights"]
    entropy = (jnp.log(sums) - stats["weights_log"] / sums).mean()
    other = (sums - stats["own_weight"]).sum() / max(n * (n - 1), 1)
    return entropy, (stats["own_weight"] / sums).mean(), other


def _from_closed_form(config, closed, p, n, engine, dtype) -> tuple[Array, Array, Array]:
    """The same from sampled rows for the cosine's weights, exactly for constant ones."""
    if not closed.slope:
        row = jnp.full(n, closed.constant, dtype).at[0].add(closed.own)
        entropy = jnp.log(row.sum()) - xlogx(row).sum() / row.sum()
        return entropy, row[0] / row.sum(), jnp.asarray(closed.constant if n > 1 else 0, dtype)

    def body(own, cosines, _, sum_over_columns):
        matrix = closed.constant + closed.slope * cosines
        sums = sum_over_columns(matrix.sum(axis=1))
        logs = sum_over_columns(xlogx(matrix).sum(axis=1))
        own_weight = closed.constant + closed.slope * own + closed.own
        entropy = (jnp.log(sums) - logs / sums).mean()
        return entropy, (own_weight / sums).mean(), (sums - own_weight).mean() / max(n - 1, 1)

    p = lax.stop_gradient(p)
    return engine.sampled(p, None, weights.sample_stride(n, config), body)


def collect_dense(config, inputs, matrix, masked, losses) -> dict[str, Array]:
    """The same diagnostics from N x N arrays."""
    scale = jnp.exp(jnp.asarray(inputs.logit_scale, losses[0].dtype))
    out = {"loss_u_to_v": losses[0], "loss_v_to_u": losses[1], "inverse_temperature": scale}
    if not config.diagnostics:
        return jax.tree.map(lax.stop_gradient, out)
    n = len(inputs.u)
    own = jnp.eye(n, dtype=bool)
    logits = pair_logits(inputs.u, inputs.v, inputs.logit_scale)
    if masked is not None:
        logits = jnp.where(masked, -jnp.inf, logits)
        matrix = jnp.where(masked, 0, matrix)
    others = jnp.where(own, -jnp.inf, logits)
    for axis, name in ((1, "u_to_v"), (0, "v_to_u")):
        right = jnp.diagonal(logits) > others.max(axis)
        out[f"accuracy_{name}"] = right.astype(logits.dtype).mean()
    named = {"u_to_v": (matrix, losses[0]), "v_to_u": (matrix.T, losses[1])}
    chosen = [named[name] for name in named if config.weighted in (name, "both")]
    if config.name == "contrastive" and config.duplicates != "positives":
        chosen = chosen[:1]
    out |= _dense_targets(chosen, own, n)
    return jax.tree.map(lax.stop_gradient, out)


def _dense_targets(chosen, own, n: int) -> dict[str, Array]:
    per_side = []
    for matrix, _ in chosen:
        targets = soft_targets(matrix)
        entropy = -xlogx(targets).sum(axis=1).mean()
        other = jnp.where(own, 0, matrix).sum() / max(n * (n - 1), 1)
        per_side.append((entropy, jnp.diagonal(targets).mean(), other))
    entropy, own_share, other = (sum(x) / len(per_side) for x in zip(*per_side, strict=True))
    return summarise(entropy, sum(loss for _, loss in chosen) / len(chosen), own_share, other)
