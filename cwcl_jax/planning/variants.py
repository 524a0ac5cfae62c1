"""Variants of a config, each with one setting changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.models.encoders import has_blocks
from cwcl_jax.planning.estimate import Estimate, Planner
from cwcl_jax.planning.inputs import can_be_embedded
from cwcl_jax.training.options import MeshConfig

_MOST_FSDP = 8


def variants(base: Estimate, planner: Planner) -> Iterator[tuple[str, Estimate | ConfigError]]:
    """Yields (what differs, the estimate or its error), the config itself first."""
    yield "as configured", base
    for name, config, embedded in _changes(base):
        try:
            yield name, planner.estimate(config, embedded)
        except ConfigError as error:
            yield name, error


def _changes(base: Estimate) -> Iterator[tuple[str, ExperimentConfig, tuple[str, ...]]]:
    config, count = base.blueprint.config, base.devices
    same = base.embedded
    if locked := can_be_embedded(base.blueprint):
        yield f"{' and '.join(locked)} tower precomputed (embed)", config, (*same, *locked)
    fsdp = min(count, _MOST_FSDP)
    if count > 1 and config.mesh.fsdp != fsdp and count % fsdp == 0:
        mesh = MeshConfig(fsdp=fsdp)
        yield f"mesh.fsdp={fsdp}", dataclasses.replace(config, mesh=mesh), same
    if towers := _tuned_towers(base):
        changed = {m: dataclasses.replace(config.towers[m], remat="full") for m in towers}
        towers = {**config.towers, **changed}
        yield "remat=full in tuned towers", dataclasses.replace(config, towers=towers), same
    if count > 1:
        for form in ("gathered", "ring"):
            if config.loss.form != form:
                loss = dataclasses.replace(config.loss, form=form)
                yield f"loss.form={form}", dataclasses.replace(config, loss=loss), same
    if config.dtype == "float32" and config.precision != "default":
        yield "precision=default", dataclasses.replace(config, precision="default"), same
    if config.loss.precision != "default":
        loss = dataclasses.replace(config.loss, precision="default")
        yield "loss.precision=default", dataclasses.replace(config, loss=loss), same
    for chunks in {1, 4 * config.accumulation_steps} - {config.accumulation_steps}:
        if config.global_batch_size % (chunks * count) == 0:
            name = f"accumulation_steps={chunks}"
            yield name, dataclasses.replace(config, accumulation_steps=chunks), same


def _tuned_towers(base: Estimate) -> list[str]:
    """Returns the towers whose blocks train and keep more than their inputs."""
    return [
        modality
        for modality, tower in base.blueprint.config.towers.items()
        if not base.blueprint.features_are_locked(modality)
        and tower.remat != "full"
        and has_blocks(tower.encoder)
    ]
