"""Sweeps over the logits in tiles: statistics of every row and column, and the gradient.

A tile is a block of rows (u) against a block of columns (v). The forward sweep returns each row's
and each column's log-sum-exp as a pair (max, sum), sums of the weights if they are computed tile by
tile, and maxima for the accuracies. The backward sweep computes each tile again:

    G_ij = a_i exp(l_ij - max_i) + c_j exp(l_ij - max_j) - [i = j] d - w_ij (e_i + f_j)
    du_i = s sum_j G_ij v_j,   dv_j = s sum_i G_ij u_i

so nothing of size N x N is ever kept. The term "negatives" adds the same expression with its own
factors where i != j. The positive pair's term is added inside the tile, not afterwards: for a well
matched pair it cancels against the softmax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cwcl_jax.losses.numerics import wide
from cwcl_jax.losses.own_pairs import OwnPairs
from cwcl_jax.losses.tiles import Side, Stats, Tile, Tiling, make_tile
from cwcl_jax.losses.weights import xlogx
from cwcl_jax.precision import product


def scan_blocks(
    step: Callable, carry: Any, items: Any, block: int, least: int = 1
) -> tuple[Any, Any]:
    """Runs `lax.scan` of `step(carry, first, items_of_a_block)`; the last block may be ragged.

    If fewer than `least` items are left for the last block, it also takes those of the block before
    it. Returns the last carry and the joined outputs.
    """
    n = jax.tree.leaves(items)[0].shape[0]
    full, rest = divmod(n, block) if n > block else (0, n)
    if full and 0 < rest < least:
        full, rest = full - 1, rest + block
    outputs: list[Any] = []
    if full:
        blocks = jax.tree.map(lambda x: x[: full * block].reshape(full, block, *x.shape[1:]), items)
        firsts = jnp.arange(full, dtype=jnp.int32) * block
        carry, stacked = lax.scan(lambda c, x: step(c, *x), carry, (firsts, blocks))
        outputs.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    if rest:
        tail = jax.tree.map(lambda x: x[full * block :], items)
        carry, last = step(carry, jnp.asarray(full * block, jnp.int32), tail)
        outputs.append(last)
    if len(outputs) == 1:
        return carry, outputs[0]
    return carry, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), *outputs)


def _reduce_logits(tiling, logits: Array, masked: Array, own: OwnPairs, axis: int) -> Stats:
    """Returns max, sum of exponentials, positive and best other logit of rows or columns.

    `axis` 1 reduces each row, 0 each column.

    `masked` are the logits without the positive pairs.
    """
    own_logits = own.values(logits, axis, -jnp.inf)
    best_other = masked.max(axis)
    largest = jnp.maximum(best_other, own_logits)
    # A row in which everything here is masked has no maximum.
    largest = jnp.maximum(largest, jnp.finfo(logits.dtype).min)
    stats = {"max": largest, "own": own.values(logits, axis, 0), "best_other": best_other}
    if tiling.negatives_alone:
        # Relative to the largest of the others: next to a well matched pair they would underflow.
        least = jnp.maximum(best_other, jnp.finfo(logits.dtype).min)
        stats["others"] = jnp.exp(masked - jnp.expand_dims(least, axis)).sum(axis)
        others = stats["others"] * jnp.exp(least - largest)
    else:
        others = jnp.exp(masked - jnp.expand_dims(largest, axis)).sum(axis)
    return stats | {"sum": others + jnp.exp(own_logits - largest)}


def _reduce_weights(tiling, logits, weights, own: OwnPairs, axis: int) -> Stats:
    products = _products(tiling, weights, logits)
    stats = {"weights": weights.sum(axis), "weighted_logits": products.sum(axis)}
    if tiling.diagnostics:
        stats["weights_log"] = xlogx(weights).sum(axis)
        stats["own_weight"] = own.values(weights, axis, 0)
    if tiling.negatives_alone:
        others = own.replaced(weights, jnp.zeros((own.shape[0],) * 2, weights.dtype))
        stats["other_weights"] = others.sum(axis)
        stats["other_weighted_logits"] = _products(tiling, others, logits).sum(axis)
    return stats


def _products(tiling, weights: Array, logits: Array) -> Array:
    products = weights * logits
    return jnp.where(weights == 0, 0, products) if tiling.masks else products


def _reduce_sigmoid(tiling, tile: Tile, own: OwnPairs) -> tuple[Stats, Stats]:
    """Returns losses and bias gradients by rows; positive and best other logits of both sides."""
    logits = tile.logits[0]
    masked = own.masked(logits)
    stats = [
        {"own": own.values(logits, axis, 0), "best_other": masked.max(axis)} for axis in (1, 0)
    ]
    if tile.weights[0] is not None:
        stats[0] |= _reduce_weighted_sigmoid(tiling, tile, own)
        return stats[0], stats[1]
    own_logits = own.values(logits, 1, jnp.inf)
    stats[0]["loss"] = jax.nn.softplus(masked).sum(axis=1) + jax.nn.softplus(-own_logits)
    slopes = jax.nn.sigmoid(masked).sum(axis=1)
    stats[0]["bias_gradient"] = slopes - jax.nn.sigmoid(-own_logits)
    return stats[0], stats[1]


def _sigmoids(z: Array, small: Array) -> tuple[Array, Array]:
    """Returns sigmoid(z) and sigmoid(-z) from `small` = exp(-|z|)."""
    large = 1 / (1 + small)
    small = small * large
    return jnp.where(z >= 0, large, small), jnp.where(z >= 0, small, large)


def _reduce_weighted_sigmoid(tiling, tile: Tile, own: OwnPairs) -> Stats:
    logits, weights = tile.logits[0], tile.weights[0]
    a, b = tiling.negatives
    against = a - b * weights
    small = jnp.exp(-jnp.abs(logits))  # one exponential serves both signs
    rest = jnp.log1p(small)
    losses = weights * (jnp.maximum(-logits, 0) + rest)
    losses += against * (jnp.maximum(logits, 0) + rest)
    right, wrong = _sigmoids(logits, small)
    slopes = against * right - weights * wrong
    least = xlogx(weights + against) - xlogx(weights) - xlogx(against)
    if tile.masked[0] is not None:
        losses, slopes, least = (jnp.where(tile.masked[0], 0, x) for x in (losses, slopes, least))
    stats = {"loss": losses.sum(axis=1), "bias_gradient": slopes.sum(axis=1)}
    if tiling.diagnostics:
        stats["weights"] = weights.sum(axis=1)
        stats["weights_log"] = xlogx(weights).sum(axis=1)
        stats["own_weight"] = own.values(weights, 1, 0)
        stats["least"] = least.sum(axis=1)
    return stats


def merge(a: Stats, b: Stats) -> Stats:
    """Returns the combined statistics of two sets of tiles for the same rows or columns."""
    merged = {}
    for largest, total in (("max", "sum"), ("best_other", "others")):
        if total not in a:
            continue
        merged[largest] = top = jnp.maximum(a[largest], b[largest])
        # Two rows without any entry yet would give inf - inf.
        shifts = [jnp.where(x[largest] == -jnp.inf, -jnp.inf, x[largest] - top) for x in (a, b)]
        if largest == "max":
            shifts = [x[largest] - top for x in (a, b)]
        merged[total] = a[total] * jnp.exp(shifts[0])
        merged[total] += b[total] * jnp.exp(shifts[1])
    for name in a:
        if name == "best_other":
            merged[name] = jnp.maximum(a[name], b[name])
        elif name not in merged:
            merged[name] = a[name] + b[name]
    return merged


def empty_stats(tiling: Tiling, n: int, dtype: jnp.dtype, side: str) -> Stats:
    """Returns the statistics of `n` "rows" or "columns" before the first tile."""
    weighted = tiling.rows_weighted if side == "rows" else tiling.columns_weighted
    names = ["own", "best_other"]
    if tiling.masks and tiling.diagnostics:
        names += ["masked"]
    if tiling.kind == "softmax":
        names += ["max", "sum"]
        names += ["others"] if tiling.negatives_alone else []
        names += ["weights", "weighted_logits"] if weighted else []
        alone = weighted and tiling.negatives_alone
        names += ["other_weights", "other_weighted_logits"] if alone else []
    elif side == "rows":
        names += ["loss", "bias_gradient"]
        weighted = tiling.source != "none"
        names += ["weights", "least"] if weighted and tiling.diagnostics else []
    else:
        weighted = False
    names += ["weights_log", "own_weight"] if weighted and tiling.diagnostics else []
    start = {"max": jnp.finfo(dtype).min, "best_other": -jnp.inf}
    return {name: jnp.full(n, start.get(name, 0), dtype) for name in names}


def _reduce_tile(tiling: Tiling, tile: Tile, own: OwnPairs) -> tuple[Stats, Stats]:
    """Returns one tile's statistics of its rows and of its columns."""
    if tiling.kind == "sigmoid":
        sides: Any = _reduce_sigmoid(tiling, tile, own)
    else:
        masked = own.masked(tile.logits[0])
        both = (masked, own.masked(tile.logits[1]) if tiling.guided else masked)
        sides = tuple(
            _reduce_logits(tiling, logits, others, own, axis)
            for logits, others, axis in zip(tile.logits, both, (1, 0), strict=True)
        )
        weighted = (tiling.rows_weighted, tiling.columns_weighted)
        for side, axis in enumerate((1, 0)):
            if weighted[side]:
                sides[side].update(
                    _reduce_weights(tiling, tile.logits[side], tile.weights[side], own, axis)
                )
    if tiling.masks and tiling.diagnostics:
        for side, axis in enumerate((1, 0)):
            sides[side]["masked"] = tile.masked[side].sum(axis).astype(tile.logits[0].dtype)
    return sides


def forward_sweep(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, first: Array
) -> tuple[Stats, Stats]:
    """Returns the statistics of all rows and all columns.

    Args:
      tiling: static description of the sweep.
      rows, columns: "x" (the embeddings) and what the weights need: "p", "labels", "targets".
      scalars: "scale" s; "first_column", the index of the first of these columns among all; "bias"
          and "sharpness" where they are needed.
      first: the column of row 0's positive pair, a multiple of the number of rows; may lie outside.
    """
    n, m = rows["x"].shape[0], columns["x"].shape[0]
    dtype = wide(rows["x"])
    height, width = tiling.tile(n, m, dtype.itemsize)

    def over_columns(row_stats, first_column, part):
        size = part["x"].shape[0]
        here = scalars | {"first_column": scalars["first_column"] + first_column}

        def over_rows(column_stats, first_row, block):
            own = OwnPairs(first + first_row - first_column, block["x"].shape[0], size)
            tile = make_tile(tiling, block, part, here, own, weighted=True)
            row_stats, new = _reduce_tile(tiling, tile, own)
            return merge(column_stats, new), row_stats

        start = empty_stats(tiling, size, dtype, "columns")
        column_stats, new = scan_blocks(over_rows, start, rows, height)
        return merge(row_stats, new), column_stats

    start = empty_stats(tiling, n, dtype, "rows")
    return scan_blocks(over_columns, start, columns, width, height)


def backward_sweep(
    tiling: Tiling,
    rows: Side,
    columns: Side,
    scalars: Stats,
    first: Array,
    row_factors: Stats,
    column_factors: Stats,
    needed: tuple[bool, bool],
) -> tuple[Float[Array, "n d"] | None, Float[Array, "m d"] | None]:
    """Returns the gradients of rows and columns, without the factor s.

    A side that is not `needed` is None.

    Args:
      row_factors, column_factors: "max", "softmax" (a_i, c_j) and "weights" (e_i, f_j) of the
          module's equation; "best_other", "others" and "other_weights", the same for the negatives
          alone. Each is absent if its term is.
      scalars: also "own", d of the equation.
    """
    n, m = rows["x"].shape[0], columns["x"].shape[0]
    dtype = wide(rows["x"])
    need_rows, need_columns = needed
    height, width = tiling.tile(n, m, dtype.itemsize)

    def over_columns(row_gradient, first_column, part):
        part, part_factors = part
        size = part["x"].shape[0]
        here = scalars | {"first_column": scalars["first_column"] + first_column}

        def over_rows(column_gradient, first_row, block):
            side, factors = block
            own = OwnPairs(first + first_row - first_column, side["x"].shape[0], size)
            g = _tile_gradient(tiling, side, part, here, own, factors, part_factors)
            new = times(g, part["x"], 1) if need_rows else None
            if need_columns:
                column_gradient = column_gradient + times(g, side["x"], 0)
            return column_gradient, new

        start = jnp.zeros(part["x"].shape, dtype) if need_columns else None
        column_gradient, new = scan_blocks(over_rows, start, (rows, row_factors), height)
        return row_gradient + new if need_rows else None, column_gradient

    def times(g: Array, x: Array, axis: int) -> Array:
        return product(g, x, (((axis,), (0,)), ((), ())), tiling.precision, dtype)

    start = jnp.zeros(rows["x"].shape, dtype) if need_rows else None
    return scan_blocks(over_columns, start, (columns, column_factors), width, height)


def _tile_gradient(tiling, rows, columns, scalars, own: OwnPairs, row_factors, column_factors):
    """Returns G of one tile, in the dtype of the embeddings.

    As in attention kernels, narrow inputs have narrow products with wide sums. Positive pairs are
    subtracted before narrowing.
    """
    narrow = rows["x"].dtype
    if tiling.kind == "sigmoid":
        tile = make_tile(tiling, rows, columns, scalars, own, weighted=True)
        return _sigmoid_gradient(tiling, tile, own, narrow)
    weighted = any(
        name in factors
        for factors in (row_factors, column_factors)
        for name in ("weights", "other_weights")
    )
    tile = make_tile(tiling, rows, columns, scalars, own, weighted=weighted)
    g = _softmax_gradient(tile, row_factors, column_factors, alone=True)
    size = own.shape[0]
    corner = _softmax_gradient(
        Tile(
            tuple(own.square(x) for x in tile.logits),
            tuple(None if x is None else own.square(x) for x in tile.weights),
        ),
        row_factors,
        {k: lax.dynamic_slice(x, (own.start,), (size,)) for k, x in column_factors.items()},
        alone=False,
    )
    return own.replaced(g.astype(narrow), (corner - scalars["own"]).astype(narrow))


def _sigmoid_gradient(tiling, tile: Tile, own: OwnPairs, narrow) -> Array:
    logits, weights = tile.logits[0], tile.weights[0]
    if weights is None:
        g = jax.nn.sigmoid(logits)
        corner = -jax.nn.sigmoid(-own.square(logits))
        return own.replaced(g.astype(narrow), corner.astype(narrow))
    a, b = tiling.negatives
    right, wrong = _sigmoids(logits, jnp.exp(-jnp.abs(logits)))
    g = (a - b * weights) * right - weights * wrong
    if tile.masked[0] is not None:
        g = jnp.where(tile.masked[0], 0, g)
    return g.astype(narrow)


def _softmax_gradient(tile: Tile, row_factors: Stats, column_factors: Stats, *, alone: bool):
    """Returns G; `alone` adds the term "negatives", which positive pairs do not have."""
    g = jnp.zeros((), tile.logits[0].dtype)
    for side, (factors, axis) in enumerate(((row_factors, 1), (column_factors, 0))):
        logits, weights = tile.logits[side], tile.weights[side]
        spread = {k: jnp.expand_dims(x, axis) for k, x in factors.items()}
        if alone and "others" in factors:
            # One exponential serves both softmaxes. Where the positive pair has the largest logit,
            # its own difference would overflow; the result there is not used.
            share = spread["others"]
            if "softmax" in factors:
                share += jnp.exp(spread["best_other"] - spread["max"]) * spread["softmax"]
            g = g + jnp.exp(jnp.minimum(logits - spread["best_other"], 0)) * share
            g = g - weights * spread["other_weights"]
        elif "softmax" in factors:
            g = g + jnp.exp(logits - spread["max"]) * spread["softmax"]
        if "weights" in factors:
            g = g - weights * spread["weights"]
    return g
