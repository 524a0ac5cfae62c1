"""A config without its files, and its abstract batch: the shapes that its pipeline would give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.options import label_shape, reads_features
from cwcl_jax.data.sources.base import parse_source_line
from cwcl_jax.data.sources.embedded import named_place
from cwcl_jax.modalities import ArraySpec
from cwcl_jax.models.encoders import encoder_family
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import complete
from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint

# Inputs by tower and name; "label" is one array.
AbstractBatch = dict[str, Any]


def without_files(config: ExperimentConfig) -> ExperimentConfig:
    """Returns the config without weights; towers without preset get the sizes of their weights.

    Raises:
      ConfigError: the folder of such weights is not on this machine.
    """
    return dataclasses.replace(
        config,
        towers={name: _without_file(name, tower) for name, tower in config.towers.items()},
    )


def _without_file(modality: str, tower: TowerConfig) -> TowerConfig:
    if tower.weights and not tower.preset:
        try:
            tower = complete(tower)
        except (OSError, ValueError) as error:
            presets = ", ".join(encoder_family(tower.encoder).presets)
            raise ConfigError(
                f"the {modality} tower's sizes are read from its weights, {tower.weights}, which "
                "are not on this machine; name a preset instead: "
                f"--config.towers.{modality}.preset=... ({presets})"
            ) from error
    return dataclasses.replace(tower, weights="")


def abstract_batch(blueprint: Blueprint, embedded: Collection[str] = ()) -> AbstractBatch:
    """Returns the shapes of the global batch, split over the mesh.

    Args:
      embedded: towers for which the data has features instead of raw inputs.
    """
    config = blueprint.config
    examples, split = config.global_batch_size, sharding.batch_sharding(blueprint.mesh)

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, *shape), jnp.dtype(dtype), sharding=split)

    batch: AbstractBatch = {}
    for tower in config.towers:
        arrays = config.data.inputs_of(tower).arrays()
        if tower in embedded:
            arrays = {"features": ArraySpec((feature_width(blueprint, tower),), "float32")}
        batch[tower] = {name: array(spec.shape, spec.dtype) for name, spec in arrays.items()}
    if config.data.labels:
        batch["label"] = array(label_shape(config.data), "int32")
    if config.data.guide:  # the data has its width; assumed to be that of U's features
        batch["guide"] = array((feature_width(blueprint, config.tower_names[0]),), "float32")
    return batch


def feature_width(blueprint: Blueprint, modality: str) -> int:
    """Returns the width of a tower's features, before its head."""
    return blueprint.model_def.merge(blueprint.abstract).towers[modality].feature_width


def embedded_modalities(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns the towers whose features the training data holds (`features_from=` in its line)."""
    config = blueprint.config
    if "features_from=" not in config.data.train:
        return ()
    places = [
        place
        for part in parse_source_line(config.data.train)
        for place in part.options.get("features_from", "").split(",")
    ]
    # A folder without a name may belong to any locked tower.
    names = {named_place(place)[0] for place in places if place}
    locked = (m for m in config.tower_names if blueprint.features_are_locked(m))
    return tuple(m for m in locked if "" in names or m in names)


def can_be_embedded(blueprint: Blueprint) -> tuple[str, ...]:
    """Returns modalities whose locked tower could run once, before the training."""
    given = embedded_modalities(blueprint)
    return tuple(
        modality
        for modality in blueprint.config.tower_names
        if blueprint.features_are_locked(modality)
        and modality not in given
        and not reads_features(blueprint.config.data.inputs_of(modality))
    )


def device_bytes(leaves: Iterable[Any]) -> int:
    """Returns the bytes of one device's shards of abstract leaves."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
