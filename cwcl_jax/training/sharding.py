"""Meshes and shardings: the only module that knows how arrays are laid out on devices.

Batches are split over both mesh axes; parameters and optimizer state over `fsdp` by a rule on path
and shape. Models contain no sharding: they get whole leaves and a split batch, and XLA's
partitioner propagates the batch's split through them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cwcl_jax.config import ConfigError
from cwcl_jax.training.options import MeshConfig

BATCH_AXES = ("data", "fsdp")

# Below this size a leaf costs less to replicate than to gather.
_MIN_SIZE_TO_SHARD = 2**14


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a (data, fsdp) mesh over `devices`, by default all of the job's.

    Raises:
      ConfigError: the number of devices is not divisible by `config.fsdp`.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if config.fsdp < 1 or count % config.fsdp:
        raise ConfigError(
            f"config.mesh.fsdp={config.fsdp} does not divide the number of devices, {count}; "
            f"choose one of {[n for n in range(1, count + 1) if count % n == 0]}"
        )
    # Auto axes: with explicit ones, products such as z @ z.T of a split batch are type errors.
    return jax.make_mesh(
        (count // config.fsdp, config.fsdp),
        BATCH_AXES,
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding in which every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first dimension over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def chunked_batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of (chunks, examples, ...) that splits the second dimension."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def leaf_spec(shape: Sequence[int], fsdp: int) -> P:
    """Returns one leaf's partition: the largest dimension that `fsdp` divides, if worth it."""
    if fsdp == 1 or int(np.prod(shape)) < _MIN_SIZE_TO_SHARD:
        return P()
    divisible = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if not divisible:
        return P()
    # The last of equal dimensions: kernels are (in, out), and gathering outputs is cheaper than
    # summing over inputs.
    largest = max(divisible, key=lambda axis: (shape[axis], axis))
    return P(*("fsdp" if axis == largest else None for axis in range(len(shape))))


def leaf_sharding(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Returns the sharding of a parameter or of an optimizer leaf of the same shape."""
    return NamedSharding(mesh, leaf_spec(leaf.shape, mesh.shape["fsdp"]))


def whole(mesh: Mesh, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns leaves as a model uses them: gathered if they are split.

    XLA by itself might keep them split and split the activations along heads and channels, with the
    whole batch on every device. When compiled for A100s, it did so.
    """
    if mesh.shape["fsdp"] == 1:
        return dict(leaves)
    everywhere = replicated(mesh)
    return {path: jax.lax.with_sharding_constraint(x, everywhere) for path, x in leaves.items()}


def put_leaf(mesh: Mesh, value: np.ndarray) -> jax.Array:
    """Returns a host array, equal on all processes, placed on the mesh by the rule for leaves."""
    sharding = leaf_sharding(mesh, value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns global arrays, split over all devices, from this process's part of a batch.

    Args:
      batch: nested dict of host arrays (b / processes, ...).
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), dict(batch)
    )


def put_whole_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns global arrays, split over all devices, from a batch that every process holds."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i]),
        dict(batch),
    )
