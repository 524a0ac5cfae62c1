"""Exact ranks of the first correct candidate, in tiles, without the whole similarity matrix.

Ties: two similarities that differ by at most `TIE` are equal, and the candidate with the lower
index comes first. The rounding error of float32 similarities is several times smaller. The ranks
therefore do not depend on the tiling or the number of devices, and a collapsed model scores chance.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

TIE = 1e-6
# Rank of a query without any correct candidate: wrong at every k.
NEVER = int(np.iinfo(np.int64).max)
# Queries and candidates of one tile: 32 MiB of float32 similarities (sizes: README.md).
ROWS, COLUMNS = 4096, 2048
_PAIRS = 1 << 16


class _Side(NamedTuple):
    """One side of the similarities: its embeddings, and the similarity of each best match."""

    embeds: Float[Array, "*t n d"] | Float[np.ndarray, "*t n d"]
    groups: Int[Array, "*t n"] | Int[np.ndarray, "*t n"]  # -1: padding
    best: Float[Array, "*t n"] | Float[np.ndarray, "*t n"]  # similarity of the best match
    match: Int[Array, "*t n"] | Int[np.ndarray, "*t n"]  # index of the best match on the other side
    index: Int[Array, "*t n"] | Int[np.ndarray, "*t n"]  # index on this side


def first_match_ranks(
    queries: Float[np.ndarray, "n d"],
    candidates: Float[np.ndarray, "m d"],
    query_groups: Int[np.ndarray, "n"],
    candidate_groups: Int[np.ndarray, "m"],
) -> Int[np.ndarray, "n"]:
    """Returns for every query the rank (from 1) of its best candidate of the same group.

    A query whose group has no candidate gets `NEVER`.
    """
    return _ranks(queries, candidates, query_groups, candidate_groups, both=False)[0]


def both_match_ranks(
    u: Float[np.ndarray, "n d"],
    v: Float[np.ndarray, "m d"],
    u_groups: Int[np.ndarray, "n"],
    v_groups: Int[np.ndarray, "m"],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Returns the ranks of u -> v and of v -> u, from one sweep over the similarities."""
    return _ranks(u, v, u_groups, v_groups, both=True)


def _ranks(
    u: Float[np.ndarray, "n d"],
    v: Float[np.ndarray, "m d"],
    u_groups: Int[np.ndarray, "n"],
    v_groups: Int[np.ndarray, "m"],
    *,
    both: bool,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    for name, array in (("queries", u), ("candidates", v)):
        if not len(array):
            raise ValueError(f"no {name} to rank: the source or the class list is empty.")
        if not np.isfinite(array).all():
            raise ValueError(f"the embeddings of the {name} hold NaN or infinity: check the model.")
    # Groups are renumbered from 0, so that padding can be -1 and int32 suffices for any ids.
    groups = np.unique(np.concatenate([u_groups, v_groups]), return_inverse=True)[1]
    u_groups, v_groups = groups[: len(u)], groups[len(u) :]
    rows = _side(u, u_groups, _best_match(u, v, u_groups, v_groups), width=ROWS)
    back = _best_match(v, u, v_groups, u_groups) if both else _no_match(len(v))
    columns = _side(v, v_groups, back, width=COLUMNS)
    u_better, v_better = _sweep_all(rows, columns, both=both)
    return (
        np.where(rows.match.ravel() < 0, NEVER, u_better + 1)[: len(u)],
        np.where(columns.match.ravel() < 0, NEVER, v_better + 1)[: len(v)],
    )


def _side(
    own: Float[np.ndarray, "n d"],
    groups: Int[np.ndarray, "n"],
    matches: tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]],
    *,
    width: int,
) -> _Side:
    """Returns `own` cut into equal tiles of at most `width` rows, the last one padded."""
    best, match = matches
    tiles = -(-len(own) // width)
    width = -(-len(own) // tiles)

    def tiled(array: np.ndarray, fill: int) -> np.ndarray:
        padded = np.full((tiles * width, *array.shape[1:]), fill, array.dtype)
        padded[: len(array)] = array
        return padded.reshape(tiles, width, *array.shape[1:])

    return _Side(
        tiled(own.astype(np.float32, copy=False), 0),
        tiled(groups.astype(np.int32), -1),
        tiled(best.astype(np.float32), 0),
        tiled(match.astype(np.int32), -1),
        np.arange(tiles * width, dtype=np.int32).reshape(tiles, width),
    )


def _no_match(n: int) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    return np.zeros(n), np.full(n, -1, np.int64)


def _best_match(
    own: Float[np.ndarray, "n d"],
    other: Float[np.ndarray, "m d"],
    own_groups: Int[np.ndarray, "n"],
    other_groups: Int[np.ndarray, "m"],
) -> tuple[Float[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Returns similarity and index of the best candidate of the same group, or index -1."""
    order = np.argsort(other_groups, kind="stable")
    starts = np.searchsorted(other_groups[order], own_groups, "left")
    counts = np.searchsorted(other_groups[order], own_groups, "right") - starts
    best, match = _no_match(len(own))
    for chunk in _chunks(counts):
        count = counts[chunk]
        segments = np.cumsum(count) - count
        offsets = np.arange(count.sum()) - np.repeat(segments, count)
        mine = np.repeat(chunk, count)
        theirs = order[np.repeat(starts[chunk], count) + offsets]
        similar = np.einsum("pd,pd->p", own[mine], other[theirs], dtype=np.float64)
        best[chunk] = np.maximum.reduceat(similar, segments)
        tied = np.where(similar >= best[mine] - TIE, theirs, len(other))
        match[chunk] = np.minimum.reduceat(tied, segments)
    return best, match


def _chunks(counts: Int[np.ndarray, "n"]) -> list[Int[np.ndarray, "k"]]:
    """Returns the queries that have candidates, split into chunks of about `_PAIRS` pairs."""
    some = np.flatnonzero(counts)
    if not len(some):
        return []
    cuts = np.flatnonzero(np.diff((np.cumsum(counts[some]) - counts[some]) // _PAIRS)) + 1
    return np.split(some, cuts)


def _sweep_all(
    rows: _Side, columns: _Side, *, both: bool
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Returns how many candidates precede the best match, by row and by column (with padding)."""
    devices = jax.local_devices()[: len(rows.embeds)]
    placed = [jax.device_put(columns, device) for device in devices]
    row_counts = np.zeros(rows.groups.shape, np.int64)
    column_counts = np.zeros(columns.groups.shape, np.int64)
    for start in range(0, len(rows.embeds), len(devices)):
        # All devices get their block before the first result is awaited.
        wave = [
            (at, _sweep(jax.device_put(_Side(*(part[at] for part in rows)), device), there, both))
            for at, (device, there) in enumerate(zip(devices, placed, strict=True), start)
            if at < len(rows.embeds)
        ]
        for at, (row, column) in wave:
            row_counts[at] = row
            column_counts += np.asarray(column)
    return row_counts.ravel(), column_counts.ravel()


@partial(jax.jit, static_argnums=2)
def _sweep(rows: _Side, columns: _Side, both: bool) -> tuple[Int[Array, "n"], Int[Array, "t m"]]:
    """Sweeps one block of rows against all tiles of columns, one tile at a time."""

    def body(total: Array, tile: _Side) -> tuple[Array, Array]:
        row, column = _count_better(rows, tile, both)
        return total + row, column

    return jax.lax.scan(body, jnp.zeros(rows.groups.shape, jnp.int32), columns)


def _count_better(
    rows: _Side, columns: _Side, both: bool
) -> tuple[Int[Array, "n"], Int[Array, "m"]]:
    similar = jnp.matmul(rows.embeds, columns.embeds.T, precision=jax.lax.Precision.HIGHEST)
    row_groups, column_groups = rows.groups[:, None], columns.groups[None, :]
    wrong = (row_groups != column_groups) & (row_groups >= 0) & (column_groups >= 0)
    earlier = columns.index[None, :] < rows.match[:, None]
    before = similar - rows.best[:, None] >= jnp.where(earlier, -TIE, TIE)
    row = jnp.sum(before & wrong, axis=1, dtype=jnp.int32)
    if not both:
        return row, jnp.zeros(columns.groups.shape, jnp.int32)
    earlier = rows.index[:, None] < columns.match[None, :]
    before = similar - columns.best[None, :] >= jnp.where(earlier, -TIE, TIE)
    return row, jnp.sum(before & wrong, axis=0, dtype=jnp.int32)
