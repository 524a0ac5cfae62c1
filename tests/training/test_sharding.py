"""The rule for leaves, meshes, and batches on them."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig


def test_rule_splits_the_largest_dimension_that_divides():
    assert sharding.leaf_spec((512, 2048), 4) == P(None, "fsdp")
    assert sharding.leaf_spec((2048, 512), 4) == P("fsdp", None)
    assert sharding.leaf_spec((2049, 512), 4) == P(None, "fsdp")
    assert sharding.leaf_spec((512, 512), 4) == P(None, "fsdp")


def test_rule_replicates_small_odd_and_unsplit_leaves():
    assert sharding.leaf_spec((512,), 4) == P()
    assert sharding.leaf_spec((2049, 513), 4) == P()
    assert sharding.leaf_spec((512, 2048), 1) == P()
    assert sharding.leaf_spec((), 4) == P()


def test_mesh_uses_all_devices():
    assert dict(sharding.make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 2, "fsdp": 2}


def test_fsdp_must_divide_the_devices():
    with pytest.raises(ValueError, match=r"fsdp=3 does not divide .* 4; choose one of \[1, 2, 4\]"):
        sharding.make_mesh(MeshConfig(fsdp=3))


def test_batches_come_back_in_order():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    rows = np.arange(8 * 3).reshape(8, 3)
    for put in (sharding.put_batch, sharding.put_whole_batch):
        placed = put(mesh, {"image": {"pixels": rows}})["image"]["pixels"]
        np.testing.assert_array_equal(np.asarray(placed), rows)
        assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
        assert isinstance(placed, jax.Array)
