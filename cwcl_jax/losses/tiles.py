"""Sweeps over the logits in tiles: what the loss needs of every row and column, and its gradient.

A tile is a block of rows (u) against all columns at hand (v). The forward sweep yields each row's
and each column's log-sum-exp as a pair (max, sum), sums of the weights where they are made tile by
tile, and maxima for the accuracies. The backward sweep makes each tile again:

    G_ij = a_i exp(l_ij - max_i) + c_j exp(l_ij - max_j) - [i is j's pair] d - w_ij (e_i + f_j)
    du_i = s sum_j G_ij v_j,   dv_j = s sum_i G_ij u_i

so nothing of size N x N is ever kept. The own pair's term is inside the tile, not added later:
for a pair that is matched well it cancels against the softmax.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from cwcl_jax.losses.reference import wide
from cwcl_jax.losses.weights import WeightFunction, xlogx

Side = dict[str, Array]
Stats = dict[str, Array]

# A tile of logits takes about this many bytes.
_TILE_BYTES = 32 * 2**20
_BLOCK_LIMITS = (128, 2048)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static facts of a sweep.

    Attributes:
      kind: "softmax" (both directions' softmaxes) or "sigmoid" (every pair on its own).
      source: of the weights of a tile: "none" (own pair only), "cosine" (`function` of the inner
        products of p), "constant", "labels" or "targets" (the caller's N x N array).
      function: for "cosine".
      offdiagonal: for "constant".
      rows_weighted, columns_weighted: the directions that have weighted targets.
      duplicates: see `LossConfig`.
      diagnostics: also sum what entropies and accuracies need.
      block_size: rows of a tile, 0 chooses.
      precision: of float32 products.
    """

    kind: str = "softmax"
    source: str = "none"
    function: WeightFunction | None = None
    offdiagonal: float = 1.0
    rows_weighted: bool = False
    columns_weighted: bool = False
    duplicates: str = "negatives"
    diagnostics: bool = True
    block_size: int = 0
    precision: str = "highest"

    def block(self, rows: int, columns: int, itemsize: int) -> int:
        """Rows of one tile."""
        low, high = _BLOCK_LIMITS
        chosen = self.block_size or min(high, max(low, _TILE_BYTES // (columns * itemsize)))
        return min(rows, chosen)


def inner(a: Array, b: Array, precision: str) -> Array:
    """a b^T, accumulated in float32 or better."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wide(a)
    )


def tile_logits(tiling: Tiling, rows: Side, columns: Side, scalars: Stats, own: Array) -> Array:
    """s <u_i, v_j>; -inf at masked duplicates."""
    logits = inner(rows["x"], columns["x"], tiling.precision) * scalars["scale"]
    if tiling.kind == "sigmoid":
        logits += scalars["bias"]
    if tiling.duplicates == "masked":
        return jnp.where(same_label(rows, columns) & ~own, -jnp.inf, logits)
    return logits


def positive_pairs(tiling: Tiling, rows: Side, columns: Side, own: Array) -> Array:
    """Pairs that the sigmoid loss pulls together."""
    return own | same_label(rows, columns) if tiling.duplicates == "positives" else own


def tile_weights(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, own: Array, dtype: jnp.dtype
) -> Array:
    """The weights of one tile."""
    match tiling.source:
        case "cosine":
            assert tiling.function is not None
            cosine = inner(rows["p"], columns["p"], tiling.precision)
            weights = tiling.function(cosine, scalars["sharpness"])
        case "constant":
            weights = jnp.where(own, 1.0, tiling.offdiagonal)
        case "labels":
            weights = same_label(rows, columns)
        case _:
            weights = lax.dynamic_slice_in_dim(
                rows["targets"], scalars["first_column"], columns["x"].shape[0], axis=1
            )
    weights = weights.astype(dtype)
    if tiling.duplicates == "positives":
        weights = jnp.where(same_label(rows, columns), jnp.ones((), dtype), weights)
    if tiling.duplicates == "masked":
        weights = jnp.where(same_label(rows, columns) & ~own, jnp.zeros((), dtype), weights)
    return weights


def same_label(rows: Side, columns: Side) -> Array:
    """Which pairs of a tile have equal labels."""
    return rows["labels"][:, None] == columns["labels"][None, :]


def own_pairs(first: Array, shape: tuple[int, int]) -> Array:
    """Where a tile holds rows' own pairs: column `first` belongs to row 0, the next to row 1..."""
    return lax.broadcasted_iota(jnp.int32, shape, 1) - first == lax.broadcasted_iota(
        jnp.int32, shape, 0
    )


def scan_blocks(step: Callable, carry, rows, block: int) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, first_row, rows_of_a_block)`, with a ragged last block."""
    n = jax.tree.leaves(rows)[0].shape[0]
    full, rest = divmod(n, block)
    if full == 1:
        full, rest = 0, n
        if n > block:
            full, rest = 1, n - block
    outputs = []
    if full:
        blocks = jax.tree.map(lambda x: x[: full * block].reshape(full, block, *x.shape[1:]), rows)
        firsts = jnp.arange(full, dtype=jnp.int32) * block
        carry, stacked = lax.scan(lambda c, x: step(c, *x), carry, (firsts, blocks))
        outputs.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked))
    if rest:
        tail = jax.tree.map(lambda x: x[full * block :], rows)
        carry, last = step(carry, jnp.asarray(full * block, jnp.int32), tail)
        outputs.append(last)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *outputs)


def _reduce_tile(tiling, logits, weights, own, axis: int, weighted: bool) -> Stats:
    """Max, sum and the rest of each row (axis 1) or column (axis 0) of one tile."""
    stats = {"own": jnp.where(own, logits, 0).sum(axis)}
    if tiling.diagnostics:
        stats["best_other"] = jnp.where(own, -jnp.inf, logits).max(axis)
    if tiling.kind == "sigmoid":
        return stats
    stats["max"] = logits.max(axis)
    # A row of which everything here is masked has no maximum.
    shift = jnp.where(jnp.isfinite(stats["max"]), stats["max"], 0)
    stats["sum"] = jnp.exp(logits - jnp.expand_dims(shift, axis)).sum(axis)
    stats["max"] = shift
    if weighted:
        stats |= _reduce_weights(tiling, logits, weights, own, axis)
    return stats


def _reduce_weights(tiling, logits, weights, own, axis: int) -> Stats:
    products = weights * logits
    if tiling.duplicates == "masked":
        products = jnp.where(weights == 0, 0, products)
    stats = {"weights": weights.sum(axis), "weighted_logits": products.sum(axis)}
    if tiling.diagnostics:
        stats["weights_log"] = xlogx(weights).sum(axis)
        stats["own_weight"] = jnp.where(own, weights, 0).sum(axis)
    return stats


def merge(a: Stats, b: Stats) -> Stats:
    """Joins what two sets of tiles say of the same rows or columns."""
    merged = {}
    if "max" in a:
        merged["max"] = largest = jnp.maximum(a["max"], b["max"])
        merged["sum"] = a["sum"] * jnp.exp(a["max"] - largest)
        merged["sum"] += b["sum"] * jnp.exp(b["max"] - largest)
    for name in a:
        if name == "best_other":
            merged[name] = jnp.maximum(a[name], b[name])
        elif name not in merged:
            merged[name] = a[name] + b[name]
    return merged


def empty_stats(tiling: Tiling, n: int, dtype: jnp.dtype, side: str) -> Stats:
    """What is known of `n` "rows" or "columns" before any tile."""
    weighted = tiling.rows_weighted if side == "rows" else tiling.columns_weighted
    names = ["own"] + (["best_other"] if tiling.diagnostics else [])
    if tiling.kind == "softmax":
        names += ["max", "sum"]
    elif side == "rows":
        names += ["loss", "bias_gradient"]
    names += ["weights", "weighted_logits"] if weighted else []
    names += ["weights_log", "own_weight"] if weighted and tiling.diagnostics else []
    lowest = jnp.finfo(dtype).min
    start = {"max": lowest, "best_other": -jnp.inf}
    return {name: jnp.full(n, start.get(name, 0), dtype) for name in names}


def forward_sweep(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, first: Array
) -> tuple[Stats, Stats]:
    """Statistics of all rows and all columns.

    Args:
      tiling: static facts.
      rows, columns: "x" (the embeds) and what the weights need: "p", "labels", "targets".
      scalars: "scale" s; "sharpness" and "first_column" where the weights need them.
      first: the column that is row 0's own pair; may lie outside.
    """
    n, m = rows["x"].shape[0], columns["x"].shape[0]
    dtype = wide(rows["x"])

    def step(column_stats, first_row, block):
        shape = (block["x"].shape[0], m)
        own = own_pairs(first + first_row, shape)
        logits = tile_logits(tiling, block, columns, scalars, own)
        weights = None
        if tiling.source != "none":
            weights = tile_weights(tiling, block, columns, scalars, own, dtype)
        here = _reduce_tile(tiling, logits, weights, own, 0, tiling.columns_weighted)
        row_stats = _reduce_tile(tiling, logits, weights, own, 1, tiling.rows_weighted)
        if tiling.kind == "sigmoid":
            positive = positive_pairs(tiling, block, columns, own)
            negated = jnp.where(positive, -logits, logits)
            slopes = jnp.where(positive, -1, 1) * jax.nn.sigmoid(negated)
            row_stats["loss"] = jax.nn.softplus(negated).sum(axis=1)
            row_stats["bias_gradient"] = slopes.sum(axis=1)
        return merge(column_stats, here), row_stats

    start = empty_stats(tiling, m, dtype, "columns")
    block = tiling.block(n, m, dtype.itemsize)
    column_stats, row_stats = scan_blocks(step, start, rows, block)
    return row_stats, column_stats


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
    """Gradients of rows and columns, without the common factor s; None for what is not `needed`.

    Args:
      row_factors, column_factors: "max", "softmax" (a_i, c_j) and "weights" (e_i, f_j) of the
        module's equation, each absent where its term is.
      scalars: also "own", d of the equation.
    """
    m = columns["x"].shape[0]
    dtype = wide(rows["x"])
    need_rows, need_columns = needed

    def step(column_gradient, first_row, block):
        side, factors = block
        x = side["x"]
        own = own_pairs(first + first_row, (x.shape[0], m))
        g = _tile_gradient(tiling, side, columns, scalars, own, factors, column_factors)
        # As in attention kernels, narrow inputs keep narrow products with wide sums.
        g = g.astype(x.dtype)
        row_gradient = None
        if need_rows:
            row_gradient = lax.dot(
                g, columns["x"], precision=tiling.precision, preferred_element_type=dtype
            )
        if need_columns:
            column_gradient = column_gradient + lax.dot_general(
                g,
                x,
                (((0,), (0,)), ((), ())),
                precision=tiling.precision,
                preferred_element_type=dtype,
            )
        return column_gradient, row_gradient

    start = jnp.zeros(columns["x"].shape, dtype) if need_columns else None
    block = tiling.block(rows["x"].shape[0], m, dtype.itemsize)
    column_gradient, row_gradient = scan_blocks(step, start, (rows, row_factors), block)
    return row_gradient, column_gradient


def _tile_gradient(tiling, rows, columns, scalars, own, row_factors, column_factors) -> Array:
    """G of one tile."""
    logits = tile_logits(tiling, rows, columns, scalars, own)
    if tiling.kind == "sigmoid":
        positive = positive_pairs(tiling, rows, columns, own)
        return jnp.where(positive, -jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits))
    g = jnp.where(own, -scalars["own"], 0).astype(logits.dtype)
    if "softmax" in row_factors:
        row_max = row_factors["max"][:, None]
        g += jnp.exp(logits - row_max) * row_factors["softmax"][:, None]
    if "softmax" in column_factors:
        column_max = column_factors["max"][None, :]
        g += jnp.exp(logits - column_max) * column_factors["softmax"][None, :]
    if "weights" in row_factors or "weights" in column_factors:
        weights = tile_weights(tiling, rows, columns, scalars, own, logits.dtype)
        if "weights" in row_factors:
            g -= weights * row_factors["weights"][:, None]
        if "weights" in column_factors:
            g -= weights * column_factors["weights"][None, :]
    return g
