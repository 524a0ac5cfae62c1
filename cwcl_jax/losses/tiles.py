"""One tile of the logits: a block of rows (u) against a block of columns (v).

A tile holds logits, weights and masks, for the direction of the rows and for that of the columns.
The sweeps over all tiles are in `cwcl_jax.losses.sweeps`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from cwcl_jax.losses.labels import label_weights, same_labels
from cwcl_jax.losses.numerics import inner, wide
from cwcl_jax.losses.own_pairs import OwnPairs
from cwcl_jax.losses.weights import WeightFunction, exponential

Side = dict[str, Array]
Stats = dict[str, Array]

# A tile of logits takes at most about this many bytes, with its number of rows in these limits.
# Fewer rows make the products inefficient, more leave the caches (README.md, "Measured"). CPUs also
# need few columns. So do GPUs, with more rows, which update the columns' gradient less often: 1,024
# x 4,096 logits, their narrow copy and that gradient fit together in 40 to 50 MB of L2
# ("Accelerators"). TPUs, whose compiler tiles by itself, get all columns.
_TILE_BYTES = 64 * 2**20
_BLOCK_LIMITS = {"cpu": (128, 512), "gpu": (128, 1024), "tpu": (128, 512)}
_COLUMNS = {"cpu": 4096, "gpu": 4096}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static description of a sweep.

    Attributes:
      kind: "softmax" (both directions' softmaxes) or "sigmoid" (every pair on its own).
      source: what a tile's weights are computed from: "none" (positive pairs only), "cosine" or
          "distance" (`function` of inner products or squared distances of p), "constant", "labels"
          or "targets" (the caller's N x N array).
      function: the weight function, for "cosine" and "distance".
      number: for "constant", the weight of any other pair; for "labels", that of sets that overlap.
      two_sided: whether the columns' weights are computed from q instead of p.
      rows_weighted, columns_weighted: the directions that have weighted targets.
      duplicates: see `LossConfig`, without its margin.
      negatives_alone: also sum what the term "negatives" needs.
      negatives: (a, b) of the sigmoid losses.
      mixes: whether weights of sigmoid losses are mixed with the positive pairs, by the scalar
          "mix".
      diagnostics: also sum what entropies and accuracies need.
      block_size: rows of a tile; 0 chooses automatically.
      block_columns: columns of a tile; 0 chooses automatically.
      precision: of float32 products.
    """

    kind: str = "softmax"
    source: str = "none"
    function: WeightFunction | None = None
    number: float = 1.0
    two_sided: bool = False
    rows_weighted: bool = False
    columns_weighted: bool = False
    duplicates: str = "negatives"
    negatives_alone: bool = False
    negatives: tuple[float, float] = (1.0, 1.0)
    mixes: bool = False
    diagnostics: bool = True
    block_size: int = 0
    block_columns: int = 0
    precision: str = "highest"

    @property
    def masks(self) -> bool:
        """Whether any pairs are left out."""
        return self.duplicates in ("masked", "absolute", "relative")

    @property
    def guided(self) -> bool:
        """Whether pairs are left out by similarities of p."""
        return self.duplicates in ("absolute", "relative")

    def tile(self, rows: int, columns: int, itemsize: int) -> tuple[int, int]:
        """Returns the rows and columns of one tile; the last tiles may be smaller or larger.

        No tile may hold only some of its rows' positive pairs. Positive pairs start at a multiple
        of `rows` (0 if there are as many columns), so it is enough that tiles divide both evenly.
        """
        kind = jax.default_backend()
        width = min(columns, self.block_columns or _COLUMNS.get(kind, columns))
        low, high = _BLOCK_LIMITS.get(kind, (128, 512))
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


@dataclasses.dataclass
class Tile:
    """One tile as seen by the rows' direction and by the columns' direction, often the same arrays.

    Attributes:
      logits: (rows', columns') logits of each direction, -inf at masked pairs.
      weights: weights, 0 at masked pairs; None without weights.
      masked: pairs that are left out; None if there are none.
    """

    logits: Any
    weights: Any = (None, None)
    masked: Any = (None, None)


def make_tile(
    tiling: Tiling, rows: Side, columns: Side, scalars: Stats, own: OwnPairs, *, weighted: bool
) -> Tile:
    """Returns logits s <u_i, v_j> (for sigmoid plus the bias), weights if wanted, and masks."""
    logits = inner(rows["x"], columns["x"], tiling.precision) * scalars["scale"]
    if tiling.kind == "sigmoid":
        logits += scalars["bias"]
    similarity = None
    if tiling.guided or (weighted and tiling.source in ("cosine", "distance")):
        similarity = inner(rows["p"], columns["p"], tiling.precision)
    tile = Tile((logits, logits))
    if tiling.masks:
        masked = _masks(tiling, rows, columns, similarity, own)
        tile.masked = masked
        tile.logits = tuple(jnp.where(m, -jnp.inf, logits) for m in masked)
        if not tiling.guided:
            tile.logits = (tile.logits[0],) * 2
    if weighted and tiling.source != "none":
        tile.weights = _weights_of_sides(tiling, rows, columns, scalars, similarity, own, tile)
    return tile


def _masks(tiling, rows, columns, similarity, own: OwnPairs) -> tuple[Array, Array]:
    """Returns what rows and what columns leave out; positive pairs are always kept."""
    if not tiling.guided:
        same = same_labels(rows["labels"], columns["labels"]) & ~own.mask()
        return same, same
    nothing = jnp.zeros((own.shape[0],) * 2, bool)
    return (
        own.replaced(similarity > rows["limit"][:, None], nothing),
        own.replaced(similarity > columns["limit"][None, :], nothing),
    )


def _weights_of_sides(tiling, rows, columns, scalars, similarity, own: OwnPairs, tile: Tile):
    dtype = tile.logits[0].dtype
    one = _tile_weights(tiling, rows, columns, scalars, similarity, own, "p").astype(dtype)
    both = (one, one)
    if tiling.two_sided:
        similarity = inner(rows["q"], columns["q"], tiling.precision)
        other = _tile_weights(tiling, rows, columns, scalars, similarity, own, "q")
        both = (one, other.astype(dtype))
    if tiling.duplicates == "positives":
        same = same_labels(rows["labels"], columns["labels"])
        both = tuple(jnp.where(same, jnp.ones((), dtype), x) for x in both)
    if tiling.masks:
        both = tuple(
            jnp.where(m, jnp.zeros((), dtype), x) for x, m in zip(both, tile.masked, strict=True)
        )
    if tiling.mixes:
        share = scalars["mix"].astype(dtype)
        both = tuple(
            own.replaced((1 - share) * x, (1 - share) * own.square(x) + share) for x in both
        )
    return both


def _tile_weights(tiling, rows, columns, scalars, similarity, own: OwnPairs, of: str) -> Array:
    """Returns the weights of one tile from one modality's similarities."""
    match tiling.source:
        case "cosine" | "distance":
            assert tiling.function is not None
            if tiling.source == "distance":
                squares = rows["square_" + of][:, None] + columns["square_" + of][None, :]
                similarity = jnp.maximum(squares - 2 * similarity, 0)
            weights = tiling.function(similarity, scalars["sharpness_" + of])
            if tiling.function is exponential or tiling.source == "distance":
                # Rows of narrow dtypes have a norm that is only approximately 1.
                weights = own.replaced(weights, jnp.ones((own.shape[0],) * 2, weights.dtype))
        case "constant":
            weights = jnp.where(own.mask(), 1.0, tiling.number)
        case "labels":
            dtype = wide(rows["x"])
            weights = label_weights(rows["labels"], columns["labels"], tiling.number, dtype)
            weights = own.replaced(weights, jnp.ones((own.shape[0],) * 2, dtype))
        case _:
            weights = lax.dynamic_slice_in_dim(
                rows["targets"], scalars["first_column"], columns["x"].shape[0], axis=1
            )
    return weights
