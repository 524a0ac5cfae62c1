"""The abstract batch of a config: shapes that its pipeline would give, without any data."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.data.options import reads_features
from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint

# By modality the inputs of its tower by name; "label" is one array.
AbstractBatch = dict[str, Any]


def abstract_batch(blueprint: Blueprint, embedded: Collection[str] = ()) -> AbstractBatch:
    """The global batch, split over the mesh.

    Args:
      embedded: modalities of which the data gives features in place of raw inputs.
    """
    config = blueprint.config
    batch: AbstractBatch = {
        modality: inputs_of(blueprint, modality, config.global_batch_size, modality in embedded)
        for modality in config.tower_names
    }
    if config.data.labels:
        split = sharding.batch_sharding(blueprint.mesh)
        shape = (config.global_batch_size,)
        batch["label"] = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    return batch


def inputs_of(
    blueprint: Blueprint, modality: str, examples: int, embedded: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs of one tower for a number of examples."""
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if embedded:
        shapes = {"features": ((feature_width(blueprint, modality),), jnp.float32)}
    else:
        shapes = {
            name: (spec.shape, jnp.dtype(spec.dtype))
            for name, spec in blueprint.config.data.inputs_of(modality).arrays().items()
        }
    split = sharding.batch_sharding(blueprint.mesh)
    return {
        name: jax.ShapeDtypeStruct((examples, *shape), dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def feature_width(blueprint: Blueprint, modality: str) -> int:
    """Width of a tower's features, before its head."""
    return blueprint.model_def.merge(blueprint.abstract).towers[modality].feature_width


def embedded_modalities(blueprint: Blueprint) -> tuple[str, ...]:
    """Modalities whose features the training data already holds: `embeds=` in its source line."""
    config = blueprint.config
    if "embeds=" not in config.data.train:
        return ()
    return tuple(m for m in config.tower_names if blueprint.features_are_locked(m))


def can_be_embedded(blueprint: Blueprint) -> tuple[str, ...]:
    """Modalities whose locked tower could run once, ahead of the training."""
    given = embedded_modalities(blueprint)
    return tuple(
        modality
        for modality in blueprint.config.tower_names
        if blueprint.features_are_locked(modality)
        and modality not in given
        and not reads_features(blueprint.config.data.inputs_of(modality))
    )
