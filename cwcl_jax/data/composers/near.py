"""Batches with nearest neighbours by given features, such as a locked tower's: hard negatives.

The examples are put on a line on which neighbours are near each other in feature space: two-means
clustering divides all of them into two parts, neither smaller than a quarter, then each part again,
and so on. The line is cut into cells of a few examples, at other places in every epoch. A share of
each batch consists of whole cells; the rest are examples of other cells, drawn at random. Every
example is in at most one batch of an epoch.

The line is computed with integers, which computers add without rounding, so that all hosts and a
resumed run find the same line.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float32, Int16, Int64

from cwcl_jax.data.composers.base import ComposerError, Composition, digest
from cwcl_jax.data.draws import Draws, hash_integers
from cwcl_jax.data.order import permute
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Source

_SHIFT, _CELLS, _OTHERS, _PROJECTION = 91, 92, 93, 94
# Products of two vectors of this length, and partial sums of them, are below 2^24, so float32
# represents them exactly.
_LENGTH = 2048
# Wider features are projected at random: distances change by some percent, and rows stay small.
_WIDTH = 128
_ROWS_AT_ONCE = 4096
_ROUNDS = 3


def compose_near(
    features: str,
    *,
    share: float = 0.5,
    size: int = 8,
    source: Source,
    batch_size: int,
    seed: int,
) -> "Near":
    """Returns the batches of `near:FEATURES?share=0.5&size=8`: half of each is such cells.

    Raises:
      ComposerError: the source has no such features, or cells do not fit into the batch.
    """
    if features not in source.embedded:
        raise ComposerError(
            f"near:{features} needs features of that name with the examples (the data has "
            f"{', '.join(source.embedded) or 'none'}): add them in the source line by "
            "features_from=NAME:FILE or a folder of python -m cwcl_jax.embed, or compute those of "
            "a locked tower by config.data.keep_locked_features=True"
        )
    check_cells(features, share=share, size=size, batch_size=batch_size)
    rows, usable = whole_vectors(source, features)
    return Near(
        rows, usable, share=share, size=size, batch_size=batch_size, seed=seed, features=features
    )


def check_cells(features: str, *, share: float = 0.5, size: int = 8, batch_size: int) -> None:
    """Raises ComposerError if cells do not fit into the batch, whatever the features are."""
    del features
    if not 2 <= size <= batch_size or not 0 < share <= 1 or round(share * batch_size / size) < 1:
        raise ComposerError(
            f"size={size} neighbours and share={share} of a batch of {batch_size} make no cell: "
            "size must be at least 2, share above 0 and at most 1, and share * batch at least size"
        )


class Near(Composition):
    """The batches of neighbours; see the module's docstring.

    Args:
      rows: features as `whole_vectors` returns them.
      usable: which rows are usable; the others are in no cell.
      share: share of a batch that consists of cells, rounded to whole cells.
      size: number of examples in a cell.
      features: name of the features, for messages.
    """

    def __init__(
        self,
        rows: Int16[np.ndarray, "n d"],
        usable: Bool[np.ndarray, " n"],
        *,
        share: float,
        size: int,
        batch_size: int,
        seed: int,
        features: str = "features",
    ):
        self._seed, self._size, self._batch_size = seed, size, batch_size
        self._cells = min(round(share * batch_size / size), batch_size // size)
        self.steps = len(rows) // batch_size
        known = np.flatnonzero(usable)
        line = known[neighbour_line(rows[known], size)]
        self._known = len(known)
        self._line = np.concatenate([line, np.flatnonzero(~usable)])
        self._whole_cells = self._known // size
        if self._whole_cells < max(1, self.steps * self._cells):
            raise ComposerError(
                f"{self._known} of {len(rows)} examples have features {features!r}, too few for "
                f"{self._cells} cells of {size} in each of {self.steps} batches: lower share"
            )
        missing = len(rows) - self._known
        self.told = (
            f"near neighbours by {features!r}, {self._cells} cells of {size} in a batch of "
            f"{batch_size}"
            + (f" ({missing} examples without these features are in no cell)" if missing else "")
        )

    def batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        inside = self._cells * self._size
        cells = step * self._cells + np.arange(self._cells)
        places = self._cell_places(epoch, cells)[:, None] + np.arange(self._size)
        count = self._batch_size - inside
        others = self._other_places(epoch, step * count + np.arange(count))
        places = np.concatenate([places.ravel(), others])
        # Every epoch cuts the line at other places; its two ends count as neighbours.
        shift = hash_integers(self._seed, _SHIFT, epoch) % max(1, self._known)
        on_line = places < self._known
        places[on_line] = (places[on_line] + shift) % max(1, self._known)
        return self._line[places]

    def _cell_places(self, epoch: int, cells: Int64[np.ndarray, " c"]) -> Int64[np.ndarray, " c"]:
        """Returns where cells begin on the line, by their number in the epoch's order."""
        return permute(cells, self._whole_cells, self._seed, _CELLS, epoch) * self._size

    def _other_places(self, epoch: int, ranks: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Returns places of the examples outside the batches' cells, in the epoch's order."""
        taken = self.steps * self._cells
        total = len(self._line) - taken * self._size
        if not ranks.size:
            return ranks
        ranks = permute(ranks, total, self._seed, _OTHERS, epoch)
        cells, places = np.divmod(ranks, self._size)
        in_cells = cells < self._whole_cells - taken
        places[in_cells] += self._cell_places(epoch, taken + cells[in_cells])
        # After the last whole cell.
        places[~in_cells] = ranks[~in_cells] + taken * self._size
        return places

    def fingerprint(self) -> str:
        return digest(self._line)


def whole_vectors(
    source: Source, name: str
) -> tuple[Int16[np.ndarray, "n d"], Bool[np.ndarray, " n"]]:
    """Returns the features of all examples as integers, and which examples have any.

    The rows have length 2048 and at most 128 columns.

    Raises:
      ComposerError: the features are not vectors.
    """
    found: list[np.ndarray] = []
    usable = np.ones(len(source), bool)
    for start in range(0, len(source), _ROWS_AT_ONCE):
        numbers = np.arange(start, min(len(source), start + _ROWS_AT_ONCE))
        vectors = source.vectors(numbers)
        rows = _one_by_one(source, numbers, name, usable) if vectors is None else vectors[name]
        if rows.ndim != 2:
            raise ComposerError(
                f"near:{name} needs one vector per example; {name!r} has shape {rows.shape[1:]}"
            )
        found.append(whole_rows(rows, usable[numbers]))
    width = max(rows.shape[1] for rows in found)
    return np.concatenate([_widened(rows, width) for rows in found]), usable


def _one_by_one(
    source: Source, numbers: Int64[np.ndarray, " n"], name: str, usable: Bool[np.ndarray, " all"]
) -> np.ndarray:
    """Returns the vectors of examples; unusable ones are zero and unmarked in `usable`."""
    rows: dict[int, np.ndarray] = {}
    for number in numbers.tolist():
        try:
            rows[number] = np.asarray(source.read(number, {"features"})["features"][name])
        except (BadExample, KeyError):
            usable[number] = False
    shape = next(iter(rows.values())).shape if rows else (0,)
    none = np.zeros(shape, np.float32)
    return np.stack([rows.get(number, none) for number in numbers.tolist()])


def _widened(rows: Int16[np.ndarray, "n e"], width: int) -> Int16[np.ndarray, "n d"]:
    """Returns `rows` with `width` columns; narrower rows are of a block without usable examples."""
    return rows if rows.shape[1] == width else np.zeros((len(rows), width), np.int16)


def whole_rows(rows: np.ndarray, usable: Bool[np.ndarray, " n"]) -> Int16[np.ndarray, "n d"]:
    """Returns features as integer rows of length 2048 with at most 128 columns."""
    whole = _of_length(rows.astype(np.float64))
    if rows.shape[1] > _WIDTH:
        whole = _of_length(whole @ _signs(rows.shape[1]))
    whole[~usable] = 0
    return whole.astype(np.int16)


@functools.lru_cache(4)
def _signs(width: int) -> np.ndarray:
    draws = Draws(_PROJECTION, width)
    return np.array([1.0 - 2 * draws.below(2) for _ in range(width * _WIDTH)]).reshape(width, -1)


def _of_length(rows: np.ndarray) -> np.ndarray:
    norms = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    return np.rint(rows * (_LENGTH / np.maximum(norms, 1e-30)))


def neighbour_line(rows: Int16[np.ndarray, "n d"], size: int) -> Int64[np.ndarray, " n"]:
    """Returns row numbers, ordered so that any `size` consecutive rows are near each other.

    Args:
      rows: integer rows of length 2048.
    """
    line = np.arange(len(rows))
    parts = [(0, len(rows))]
    while parts:
        start, end = parts.pop()
        if end - start <= size:
            continue
        inside = line[start:end]
        order, cut = _two_parts(rows[inside].astype(np.float32))
        line[start:end] = inside[order]
        parts += [(start, start + cut), (start + cut, end)]
    return line


def _two_parts(rows: Float32[np.ndarray, "n d"]) -> tuple[Int64[np.ndarray, " n"], int]:
    """Returns an order of the rows and the size of its first part, at least a quarter.

    The direction leads from one of two distant rows to the other, then from the mean of one part to
    that of the other. The cut is between the means, so that a cluster is seldom divided.
    """
    count = len(rows)
    one = rows[np.argmin(rows @ rows[0])]
    other = rows[np.argmin(rows @ one)]
    for _ in range(_ROUNDS):
        direction = other - one
        along = rows @ direction
        order = np.argsort(along, kind="stable")
        between = (other.astype(np.float64) + one) @ direction / 2
        cut = int((along < between).sum())
        cut = min(max(cut, count // 4, 1), count - max(count // 4, 1))
        means = [part.mean(axis=0, dtype=np.float64) for part in (rows[order[:cut]],
                                                                  rows[order[cut:]])]  # fmt: skip
        one, other = (np.rint(mean).astype(np.float32) for mean in means)
    return order, cut
