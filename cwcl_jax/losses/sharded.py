"""The sweeps over a mesh: the loss of the global batch, with N/P rows on each device.

There are two engines of `cwcl_jax.losses.engines`, equal to one device up to rounding:

- `Gathered`: every device gathers all columns, sweeps its own rows against them, and sends the
  column gradients back with one reduce-scatter. Memory O(N d) per device.
- `Ring`: the columns travel from neighbour to neighbour, together with their statistics or
  gradients. A device holds one remote block, and a second one that is in transfer. Memory O(N d /
  P).

The gradient rule lies outside of `shard_map`, so no collective is ever differentiated.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cwcl_jax.losses.engines import duplicates
from cwcl_jax.losses.numerics import inner, wide
from cwcl_jax.losses.sweeps import backward_sweep, empty_stats, forward_sweep, merge
from cwcl_jax.losses.tiles import Side, Stats, Tiling


@dataclasses.dataclass(frozen=True)
class _MeshEngine:
    """Base of the engines. Rows of every array are split over `axes` of `mesh`, in their order."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def devices(self) -> int:
        """Number of parts of the batch."""
        count = 1
        for axis in self.axes:
            count *= self.mesh.shape[axis]
        return count

    def _forward(self, tiling: Tiling, rows: Side, columns: Side, scalars: Stats):
        """Runs `forward` on one device's part."""
        raise NotImplementedError

    def _backward(
        self, tiling, needed, rows, columns, scalars, row_factors, column_factors
    ) -> tuple[Array | None, Array | None]:
        """Runs `backward` on one device's part."""
        raise NotImplementedError

    def _map(self, function: Callable, arguments: tuple, replicated: tuple[int, ...], out_specs):
        specs = tuple(P() if i in replicated else P(self.axes) for i, _ in enumerate(arguments))
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        return mapped(*arguments)

    def forward(
        self, tiling: Tiling, rows: Side, columns: Side, scalars: Stats
    ) -> tuple[Stats, Stats]:
        """Returns the statistics of all rows and columns, split like the rows."""
        split = P(self.axes)
        return self._map(
            partial(self._forward, tiling), (rows, columns, scalars), (2,), (split, split)
        )

    def backward(self, tiling, rows, columns, scalars, row_factors, column_factors, needed):
        """Returns the gradients of both sides, split like the rows."""
        split = P(self.axes)
        return self._map(
            partial(self._backward, tiling, needed),
            (rows, columns, scalars, row_factors, column_factors),
            (2,),
            (split if needed[0] else None, split if needed[1] else None),
        )

    def sampled(self, p: Float[Array, "n k"], labels: Array | None, stride: int, body: Callable):
        """Does what `OneDevice.sampled` does, over a mesh.

        Each device computes the cosines of the sampled rows with its own columns; only the sample
        itself is communicated.
        """

        def local(p, labels):
            n = p.shape[0]
            wanted = jnp.arange(0, n * self.devices, stride) - lax.axis_index(self.axes) * n
            here = (wanted >= 0) & (wanted < n)

            def sample(x):
                rows = x[jnp.clip(wanted, 0, n - 1)]
                return lax.psum(
                    jnp.where(jnp.expand_dims(here, range(1, x.ndim)), rows, 0), self.axes
                )

            rows, same = sample(p), None
            if labels is not None:
                same = duplicates(sample(labels), labels, wanted, jnp.arange(n))
            own = jnp.square(rows.astype(wide(rows))).sum(axis=1)
            cosines = inner(rows, p)
            return body(own, cosines, same, lambda x: lax.psum(x, self.axes))

        return self._map(local, (p, labels), (), P())


class Gathered(_MeshEngine):
    """Holds all columns on every device."""

    def _columns(self, columns: Side) -> tuple[Side, Array]:
        n = columns["x"].shape[0]
        everything = jax.tree.map(lambda x: lax.all_gather(x, self.axes, tiled=True), columns)
        return everything, (lax.axis_index(self.axes) * n).astype(jnp.int32)

    def _forward(self, tiling, rows, columns, scalars):
        everything, first = self._columns(columns)
        row_stats, column_stats = forward_sweep(tiling, rows, everything, scalars, first)
        for name, total in (("max", "sum"), ("best_other", "others")):
            if name not in column_stats:
                continue
            largest = lax.pmax(column_stats[name], self.axes)
            if total in column_stats:
                shift = column_stats[name] - largest
                shift = jnp.where(largest == -jnp.inf, 0, shift) if name == "best_other" else shift
                column_stats[total] *= jnp.exp(shift)
            column_stats[name] = largest
        n = columns["x"].shape[0]
        mine = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=n)
        for name, x in column_stats.items():
            if name in ("max", "best_other"):
                column_stats[name] = mine(x)
            else:
                column_stats[name] = lax.psum_scatter(x, self.axes, tiled=True)
        return row_stats, column_stats

    def _backward(self, tiling, needed, rows, columns, scalars, row_factors, column_factors):
        everything, first = self._columns(columns)
        column_factors = jax.tree.map(
            lambda x: lax.all_gather(x, self.axes, tiled=True), column_factors
        )
        du, dv = backward_sweep(
            tiling, rows, everything, scalars, first, row_factors, column_factors, needed
        )
        if dv is not None:
            dv = lax.psum_scatter(dv, self.axes, tiled=True)
        return du, dv


class Ring(_MeshEngine):
    """Passes the columns around a ring; after as many hops as devices, every block is back home.

    The statistics of a block of columns follow one step behind: they are sent while the next block
    is swept, together with the columns themselves, so that no transfer waits for the tiles of its
    step. XLA merges permutations: one that needed this step's tiles would also delay the columns.
    """

    def _hop(self, tree):
        """Passes this device's blocks to the previous device in the ring."""
        p = self.devices
        passes = [(i, (i - 1) % p) for i in range(p)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, passes), tree)

    def _place(self, scalars: Stats, hop: Array, n: int) -> tuple[Stats, Array]:
        """Returns the position of the block of columns that is here after `hop` hops."""
        me = lax.axis_index(self.axes)
        owner = (me + hop) % self.devices
        first = ((me - owner) * n).astype(jnp.int32)
        return scalars | {"first_column": (owner * n).astype(jnp.int32)}, first

    def _forward(self, tiling, rows, columns, scalars):
        n = rows["x"].shape[0]
        dtype = wide(rows["x"])

        def step(carry, hop):
            columns, column_stats, row_stats = carry
            coming, column_stats = self._hop((columns, column_stats))
            here, first = self._place(scalars, hop, n)
            new_rows, new_columns = forward_sweep(tiling, rows, columns, here, first)
            return (coming, merge(column_stats, new_columns), merge(row_stats, new_rows)), None

        start = (
            columns,
            empty_stats(tiling, n, dtype, "columns"),
            empty_stats(tiling, n, dtype, "rows"),
        )
        (_, column_stats, row_stats), _ = lax.scan(step, start, jnp.arange(self.devices))
        return row_stats, self._hop(column_stats)

    def _backward(self, tiling, needed, rows, columns, scalars, row_factors, column_factors):
        n = rows["x"].shape[0]
        dtype = wide(rows["x"])

        def step(carry, hop):
            travelling, dv, du = carry
            columns, factors = travelling
            coming, dv = self._hop((travelling, dv))
            here, first = self._place(scalars, hop, n)
            new_du, new_dv = backward_sweep(
                tiling, rows, columns, here, first, row_factors, factors, needed
            )
            dv = None if dv is None else dv + new_dv
            return (coming, dv, None if du is None else du + new_du), None

        du = jnp.zeros(rows["x"].shape, dtype) if needed[0] else None
        dv = jnp.zeros(columns["x"].shape, dtype) if needed[1] else None
        start = ((columns, column_factors), dv, du)
        (_, dv, du), _ = lax.scan(step, start, jnp.arange(self.devices))
        return du, self._hop(dv)
