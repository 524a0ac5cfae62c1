"""Engines that run the sweeps: one device here, a mesh in `cwcl_jax.losses.sharded`."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from cwcl_jax.losses.labels import same_labels
from cwcl_jax.losses.numerics import inner, wide
from cwcl_jax.losses.sweeps import backward_sweep, forward_sweep
from cwcl_jax.losses.tiles import Side, Stats, Tiling


@runtime_checkable
class Engine(Protocol):
    """Runs the forward and the backward sweep over all pairs of rows and columns.

    The arrays are global. An engine must be hashable.
    """

    def forward(
        self, tiling: Tiling, rows: Side, columns: Side, scalars: Stats
    ) -> tuple[Stats, Stats]: ...

    def backward(
        self,
        tiling: Tiling,
        rows: Side,
        columns: Side,
        scalars: Stats,
        row_factors: Stats,
        column_factors: Stats,
        needed: tuple[bool, bool],
    ) -> tuple[Array | None, Array | None]: ...

    def sampled(self, p: Array, labels: Array | None, stride: int, body: Callable) -> Any: ...


def duplicates(row_labels: Array, labels: Array, row_places: Array, places: Array) -> Array:
    """Returns a mask of the columns that have the row's label but are a different pair."""
    return same_labels(row_labels, labels) & (row_places[:, None] != places[None, :])


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """Runs all rows against all columns on one device."""

    def sampled(
        self, p: Float[Array, "n k"], labels: Array | None, stride: int, body: Callable
    ) -> Any:
        """Returns `body(own, cosines, duplicates, sum_over_columns)` for every `stride`-th row.

        Each sampled row is compared with all columns. `duplicates` marks the other pairs with the
        row's label; it is None without labels.
        """
        rows, places = p[::stride], jnp.arange(p.shape[0])
        own = jnp.square(rows.astype(wide(rows))).sum(axis=1)
        same = None
        if labels is not None:
            same = duplicates(labels[::stride], labels, places[::stride], places)
        return body(own, inner(rows, p), same, lambda x: x)

    def forward(self, tiling, rows, columns, scalars):
        return forward_sweep(tiling, rows, columns, scalars, jnp.zeros((), jnp.int32))

    def backward(self, tiling, rows, columns, scalars, row_factors, column_factors, needed):
        first = jnp.zeros((), jnp.int32)
        return backward_sweep(
            tiling, rows, columns, scalars, first, row_factors, column_factors, needed
        )
