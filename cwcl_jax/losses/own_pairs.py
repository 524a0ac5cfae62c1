"""Location of the positive pairs (i = j) in a tile of logits."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class OwnPairs:
    """The positive pairs of a tile: column `start` belongs to row 0, the next to row 1, etc.

    The positive pairs are either all inside the tile or all outside, so they are handled as one
    square part of it. Comparing indices over the whole tile would cost as much as an exponential.
    """

    def __init__(self, start: Array, rows: int, columns: int):
        self.shape = (rows, columns)
        self.inside = (start >= 0) & (start + rows <= columns)
        self.start = jnp.clip(start, 0, columns - rows)
        self._corner = (jnp.zeros_like(self.start), self.start)
        self._diagonal = jnp.eye(rows, dtype=bool) & self.inside

    def square(self, tile: Array) -> Array:
        """Returns the square part of a tile whose diagonal holds the positive pairs."""
        rows = self.shape[0]
        return lax.dynamic_slice(tile, self._corner, (rows, rows))

    def replaced(self, tile: Array, square: Array) -> Array:
        """Returns the tile with its positive pairs replaced by the diagonal of another square."""
        square = jnp.where(self._diagonal, square, self.square(tile))
        return lax.dynamic_update_slice(tile, square, self._corner)

    def masked(self, tile: Array) -> Array:
        """Returns the tile with -inf at the positive pairs."""
        return self.replaced(tile, jnp.full((self.shape[0],) * 2, -jnp.inf, tile.dtype))

    def values(self, tile: Array, axis: int, missing: float) -> Array:
        """Returns the positive entries by rows (axis 1) or columns (0), `missing` if outside."""
        diagonal = jnp.diagonal(self.square(tile))
        if axis == 1:
            return jnp.where(self.inside, diagonal, missing)
        line = jnp.full(self.shape[1], missing, tile.dtype)
        placed = lax.dynamic_update_slice(line, diagonal, (self.start,))
        return jnp.where(self.inside, placed, line)

    def mask(self) -> Array:
        """Returns a boolean mask of the positive pairs, for rarely used functions."""
        none = jnp.zeros(self.shape, bool)
        return lax.dynamic_update_slice(none, self._diagonal, self._corner)
