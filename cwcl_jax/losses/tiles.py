"""Sweeps over the logits in tiles: what the loss needs of every row and column, and its gradient.

A tile is a block of rows (u) against a block of columns (v). The forward sweep yields each row's
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

from cwcl_jax.losses.own_pairs import OwnPairs
from cwcl_jax.losses.reference import wide
from cwcl_jax.losses.weights import WeightFunction, exponential, xlogx

Side = dict[str, Array]
Stats = dict[str, Array]

# A tile of logits takes at most about this many bytes, within these numbers of rows. Fewer rows
# make the products inefficient, more leave the caches (BUILD_NOTES.md, "Loss: block size"). A CPU
# wants few columns too; other devices, never measured, get all of them and so larger products.
_TILE_BYTES = 64 * 2**20
_BLOCK_LIMITS = (128, 512)
_CPU_COLUMNS = 4096


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
      block_columns: columns of a tile, 0 chooses.
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
    block_columns: int = 0
    precision: str = "highest"

    def tile(self, rows: int, columns: int, itemsize: int) -> tuple[int, int]:
        """Rows and columns of one tile, of so many at hand; the last ones may be smaller or larger.

        No tile may hold only some of its rows' own pairs. Own pairs start at a multiple of `rows`
        (0 if there are as many columns), so it is enough that tiles divide both evenly.
        """
        width = min(columns, self.block_columns or (_CPU_COLUMNS if _on_cpu() else columns))
        low, high = _BLOCK_LIMITS
        height = self.block_size or min(high, max(low, _TILE_BYTES // (width * itemsize)))
        height = min(rows, height)
        if width == columns:
            return height, columns
        if rows != columns:
            even = next(h for h in range(height, 0, -1) if rows % h == 0)
            if even < min(low, height):
                return height, columns
            height = even
        return height, max(width // height, 1) * height


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def inner(a: Array, b: Array, precision: str) -> Array:
    """a b^T, accumulated in float32 or better."""
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=wide(a)
    )


def tile_logits(tiling: Tiling, rows: Side, columns: Side, scalars: Stats, own: OwnPairs) -> Array:
    """s <u_i, v_j>, for the sigmoid loss plus its bias; -inf at masked duplicates."""
    logits = inner(rows["x"], columns["x"], tiling.precision) * scalars["scale"]
    if tiling.kind == "sigmoid":
        logits += scalars["bias"]
    if tiling.duplicates == "masked":
        return jnp.where(same_label(rows, columns) & ~own.mask(), -jnp.inf, logits)
    return logits


def tile_weights(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, own: OwnPairs, dtype: jnp.dtype
) -> Array:
    """The weights of one tile."""
    match tiling.source:
        case "cosine":
            assert tiling.function is not None
            cosine = inner(rows["p"], columns["p"], tiling.precision)
            weights = tiling.function(cosine, scalars["sharpness"])
            if tiling.function is exponential:
                # Rows of narrow types have a norm that is only about 1.
                weights = own.replaced(weights, jnp.ones((own.shape[0],) * 2, weights.dtype))
        case "constant":
            weights = jnp.where(own.mask(), 1.0, tiling.offdiagonal)
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
        left_out = same_label(rows, columns) & ~own.mask()
        weights = jnp.where(left_out, jnp.zeros((), dtype), weights)
    return weights


def same_label(rows: Side, columns: Side) -> Array:
    """Which pairs of a tile have equal labels."""
    return rows["labels"][:, None] == columns["labels"][None, :]


def scan_blocks(
    step: Callable, carry: Any, items: Any, block: int, least: int = 1
) -> tuple[Any, Any]:
    """`lax.scan` of `step(carry, first, items_of_a_block)`; the last block may be ragged.

    With fewer than `least` items left for it, it takes those of the block before it too.
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


def _reduce_logits(logits: Array, masked: Array, own: OwnPairs, axis: int) -> Stats:
    """Max, sum of exponentials, own and best other logit of each row (axis 1) or column (0)."""
    own_logits = own.values(logits, axis, -jnp.inf)
    best_other = masked.max(axis)
    largest = jnp.maximum(best_other, own_logits)
    # A row of which everything here is masked has no maximum.
    largest = jnp.maximum(largest, jnp.finfo(logits.dtype).min)
    others = jnp.exp(masked - jnp.expand_dims(largest, axis)).sum(axis)
    return {
        "max": largest,
        "sum": others + jnp.exp(own_logits - largest),
        "own": own.values(logits, axis, 0),
        "best_other": best_other,
    }


def _reduce_weights(tiling, logits, weights, own: OwnPairs, axis: int) -> Stats:
    products = weights * logits
    if tiling.duplicates == "masked":
        products = jnp.where(weights == 0, 0, products)
    stats = {"weights": weights.sum(axis), "weighted_logits": products.sum(axis)}
    if tiling.diagnostics:
        stats["weights_log"] = xlogx(weights).sum(axis)
        stats["own_weight"] = own.values(weights, axis, 0)
    return stats


def _reduce_sigmoid(tiling, rows, columns, logits, masked, own: OwnPairs) -> tuple[Stats, Stats]:
    """Losses and their slopes over the bias, by rows; own and best other logits of both sides."""
    stats = [
        {"own": own.values(logits, axis, 0), "best_other": masked.max(axis)} for axis in (1, 0)
    ]
    if tiling.duplicates == "positives":
        positive = same_label(rows, columns)
        masked = jnp.where(positive, -masked, masked)
        signs = jnp.where(positive, -1, 1).astype(masked.dtype)
        masked = own.masked(masked)
    else:
        signs = 1.0
    own_logits = own.values(logits, 1, jnp.inf)
    stats[0]["loss"] = jax.nn.softplus(masked).sum(axis=1) + jax.nn.softplus(-own_logits)
    slopes = (signs * jax.nn.sigmoid(masked)).sum(axis=1)
    stats[0]["bias_gradient"] = slopes - jax.nn.sigmoid(-own_logits)
    return stats[0], stats[1]


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
    names = ["own", "best_other"]
    if tiling.kind == "softmax":
        names += ["max", "sum"]
    elif side == "rows":
        names += ["loss", "bias_gradient"]
    names += ["weights", "weighted_logits"] if weighted else []
    names += ["weights_log", "own_weight"] if weighted and tiling.diagnostics else []
    start = {"max": jnp.finfo(dtype).min, "best_other": -jnp.inf}
    return {name: jnp.full(n, start.get(name, 0), dtype) for name in names}


def _reduce_tile(tiling, rows, columns, scalars, logits, own: OwnPairs) -> tuple[Stats, Stats]:
    """What one tile says of its rows and columns."""
    masked = own.masked(logits)
    if tiling.kind == "sigmoid":
        return _reduce_sigmoid(tiling, rows, columns, logits, masked, own)
    row_stats = _reduce_logits(logits, masked, own, 1)
    column_stats = _reduce_logits(logits, masked, own, 0)
    if tiling.source != "none":
        weights = tile_weights(tiling, rows, columns, scalars, own, logits.dtype)
        if tiling.rows_weighted:
            row_stats |= _reduce_weights(tiling, logits, weights, own, 1)
        if tiling.columns_weighted:
            column_stats |= _reduce_weights(tiling, logits, weights, own, 0)
    return row_stats, column_stats


def forward_sweep(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, first: Array
) -> tuple[Stats, Stats]:
    """Statistics of all rows and all columns.

    Args:
      tiling: static facts.
      rows, columns: "x" (the embeds) and what the weights need: "p", "labels", "targets".
      scalars: "scale" s; "first_column", the first of these columns among all; "bias" and
        "sharpness" where they are needed.
      first: the column that is row 0's own pair, a multiple of the number of rows; may lie outside.
    """
    n, m = rows["x"].shape[0], columns["x"].shape[0]
    dtype = wide(rows["x"])
    height, width = tiling.tile(n, m, dtype.itemsize)

    def over_columns(row_stats, first_column, part):
        size = part["x"].shape[0]
        here = scalars | {"first_column": scalars["first_column"] + first_column}

        def over_rows(column_stats, first_row, block):
            own = OwnPairs(first + first_row - first_column, block["x"].shape[0], size)
            logits = tile_logits(tiling, block, part, here, own)
            row_stats, new = _reduce_tile(tiling, block, part, here, logits, own)
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
    """Gradients of rows and columns, without the common factor s; None for what is not `needed`.

    Args:
      row_factors, column_factors: "max", "softmax" (a_i, c_j) and "weights" (e_i, f_j) of the
        module's equation, each absent where its term is.
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
            new = product(g, part["x"], 1) if need_rows else None
            if need_columns:
                column_gradient = column_gradient + product(g, side["x"], 0)
            return column_gradient, new

        start = jnp.zeros(part["x"].shape, dtype) if need_columns else None
        column_gradient, new = scan_blocks(over_rows, start, (rows, row_factors), height)
        return row_gradient + new if need_rows else None, column_gradient

    def product(g: Array, x: Array, axis: int) -> Array:
        return lax.dot_general(
            g,
            x,
            (((axis,), (0,)), ((), ())),
            precision=tiling.precision,
            preferred_element_type=dtype,
        )

    start = jnp.zeros(rows["x"].shape, dtype) if need_rows else None
    return scan_blocks(over_columns, start, (columns, column_factors), width, height)


def _tile_gradient(tiling, rows, columns, scalars, own: OwnPairs, row_factors, column_factors):
    """G of one tile, in the type of the embeds.

    As in attention kernels, narrow inputs keep narrow products with wide sums. Own pairs are
    subtracted before narrowing.
    """
    narrow = rows["x"].dtype
    logits = tile_logits(tiling, rows, columns, scalars, own)
    if tiling.kind == "sigmoid":
        g = jax.nn.sigmoid(logits)
        if tiling.duplicates == "positives":
            g = jnp.where(same_label(rows, columns), -jax.nn.sigmoid(-logits), g)
        corner = -jax.nn.sigmoid(-own.square(logits))
        return own.replaced(g.astype(narrow), corner.astype(narrow))
    weights = None
    if "weights" in row_factors or "weights" in column_factors:
        weights = tile_weights(tiling, rows, columns, scalars, own, logits.dtype)
    g = _softmax_gradient(logits, weights, row_factors, column_factors)
    size = own.shape[0]
    corner = _softmax_gradient(
        own.square(logits),
        None if weights is None else own.square(weights),
        row_factors,
        {k: lax.dynamic_slice(x, (own.start,), (size,)) for k, x in column_factors.items()},
    )
    return own.replaced(g.astype(narrow), (corner - scalars["own"]).astype(narrow))


def _softmax_gradient(logits, weights, row_factors: Stats, column_factors: Stats) -> Array:
    g = jnp.zeros((), logits.dtype)
    for factors, axis in ((row_factors, 1), (column_factors, 0)):
        spread = {k: jnp.expand_dims(x, axis) for k, x in factors.items()}
        if "softmax" in factors:
            g = g + jnp.exp(logits - spread["max"]) * spread["softmax"]
        if "weights" in factors:
            g = g - weights * spread["weights"]
    return g
