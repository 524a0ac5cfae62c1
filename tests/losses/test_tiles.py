"""Shapes of tiles: no tile may hold only some of its rows' own pairs."""

import jax
import numpy as np
import pytest

from cwcl_jax.losses.sweeps import scan_blocks
from cwcl_jax.losses.tiles import Tiling


def blocks_of(n: int, size: int, least: int = 1) -> list[tuple[int, int]]:
    """(first, size) of the blocks that `scan_blocks` makes of n items."""
    first, length = [], []

    def step(carry, start, items):
        first.append(start)
        length.append(items.shape[0])
        return carry, items + start

    _, out = scan_blocks(step, None, np.zeros(n, np.int32), size, least)
    starts, counts = np.unique(np.asarray(out), return_counts=True)
    return list(zip(starts.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize(("n", "shards"), [(37, 1), (64, 1), (4100, 1), (40, 4), (36, 3), (24, 2)])
@pytest.mark.parametrize(("height", "width"), [(8, 16), (5, 6), (8, 3), (0, 0), (64, 16)])
def test_own_pairs_lie_wholly_inside_of_a_tile_or_wholly_outside(n, shards, height, width):
    rows = n // shards
    tile_rows, tile_columns = Tiling(block_size=height, block_columns=width).tile(rows, n, 4)
    columns = blocks_of(n, tile_columns, tile_rows)
    assert sum(size for _, size in columns) == n
    for shard in range(shards):
        for first_row, size in blocks_of(rows, tile_rows):
            own = set(range(shard * rows + first_row, shard * rows + first_row + size))
            for first_column, width_here in columns:
                here = own & set(range(first_column, first_column + width_here))
                assert here in (set(), own)
                assert width_here >= size


def test_shards_that_no_reasonable_height_divides_keep_their_columns_together():
    assert Tiling(block_size=8, block_columns=16).tile(13, 52, 4) == (8, 52)
    assert Tiling(block_columns=1024).tile(4000, 16000, 4) == (500, 1000)


def test_tiles_of_a_gpu_fit_into_its_cache(monkeypatch):
    """1,024 x 4,096 float32 logits are 16 MiB; an A100 has 40 MB of L2."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Tiling().tile(16_384, 16_384, 4) == (1024, 4096)
    assert Tiling().tile(2_000, 16_000, 4) == (1000, 4000)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert Tiling().tile(16_384, 16_384, 4) == (512, 16_384)
