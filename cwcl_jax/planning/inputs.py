"""The abstract batch of a config: shapes that its pipeline would give, without any data."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint

# By modality the inputs of its tower by name; "label" is one array.
AbstractBatch = dict[str, Any]
# Name of an input -> shape of one example, type.
_Shapes = dict[str, tuple[tuple[int, ...], Any]]


def abstract_batch(blueprint: Blueprint, embedded: Collection[str] = ()) -> AbstractBatch:
    """The global batch, split over the mesh.

    Args:
      embedded: modalities of which the data gives features in place of raw inputs.
    """
    config = blueprint.config
    examples, split = config.global_batch_size, sharding.batch_sharding(blueprint.mesh)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, *shape), dtype, sharding=split)

    batch: AbstractBatch = {}
    for modality, tower in config.towers.items():
        if modality in embedded or tower.encoder == "precomputed":
            shapes: _Shapes = {"embeds": ((feature_width(blueprint, modality),), jnp.float32)}
        else:
            shapes = _raw_shapes(config.data, modality)
        batch[modality] = {name: array(*of) for name, of in shapes.items()}
    if config.data.labels:
        batch["label"] = array((), jnp.int32)
    return batch


def _raw_shapes(data: Any, modality: str) -> _Shapes:
    """What the pipeline makes of one example of a modality."""
    if modality == "image":
        return {"pixels": ((data.image.size, data.image.size, 3), jnp.uint8)}
    if modality == "text":
        tokens = (data.text.max_tokens,)
        return {"tokens": (tokens, jnp.int32), "mask": (tokens, jnp.bool_)}
    samples = round(data.speech.sample_rate * data.speech.max_seconds)
    return {"waveform": ((samples,), jnp.int16), "length": ((), jnp.int32)}


def feature_width(blueprint: Blueprint, modality: str) -> int:
    """Width of a tower's features, before its head."""
    return blueprint.model_def.merge(blueprint.abstract).towers[modality].feature_width


def embedded_modalities(blueprint: Blueprint) -> tuple[str, ...]:
    """Modalities whose features the training data already holds: `embeds=` in its source line."""
    config = blueprint.config
    if "embeds=" not in config.data.train:
        return ()
    return tuple(m for m in config.modalities if blueprint.features_are_locked(m))


def can_be_embedded(blueprint: Blueprint) -> tuple[str, ...]:
    """Modalities whose locked tower could run once, ahead of the training."""
    given = embedded_modalities(blueprint)
    return tuple(
        modality
        for modality in blueprint.config.modalities
        if blueprint.features_are_locked(modality)
        and modality not in given
        and blueprint.config.towers[modality].encoder != "precomputed"
    )


def device_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of one device's shards of abstract leaves."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
