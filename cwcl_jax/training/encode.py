"""Embeddings of a model over the mesh, for evaluation and for use after training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.state import (
    Blueprint,
    Leaves,
    TowerSource,
    initialise,
    locked_leaves,
    make_blueprint,
)
from cwcl_jax.training.workdir import check_same_sources, load_config


class EncodeFunctions:
    """Compiled encoders of a blueprint's towers; one per modality, kept between evaluations."""

    def __init__(self, blueprint: Blueprint):
        self._blueprint = blueprint
        self._jitted: dict[tuple[str, str], Any] = {}

    def get(self, modality: str, output: str) -> Any:
        """`f(params, locked, inputs) -> (b, width)` float32, replicated."""
        if modality not in self._blueprint.config.towers:
            raise ValueError(
                f"the model has no {modality!r} tower; it has "
                f"{sorted(self._blueprint.config.towers)}"
            )
        key = (modality, output)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(
                self._function(modality, output),
                out_shardings=sharding.replicated(self._blueprint.mesh),
            )
        return self._jitted[key]

    def _function(self, modality: str, output: str) -> Any:
        def encode(params: Leaves, locked: Leaves, inputs: Mapping[str, Any]) -> jax.Array:
            tower = self._blueprint.model_def.merge({**params, **locked}).towers[modality]
            features = tower.features(inputs)
            result = features if output == "features" else tower.project(features)
            return result.astype(jnp.float32)

        return encode


class Encoder:
    """A trained model as functions from host arrays to host arrays.

    Attributes:
      mesh: devices; batches of any size are padded to a multiple of their number.
      step: training steps done.
    """

    def __init__(self, functions: EncodeFunctions, params: Leaves, locked: Leaves, step: int):
        self._functions = functions
        self._params = params
        self._locked = locked
        self.mesh = functions._blueprint.mesh
        self.step = step

    def encode(
        self, modality: str, inputs: Mapping[str, np.ndarray], *, output: str = "embeds"
    ) -> np.ndarray:
        """Embeds (b, d) float32 of one batch, or features (b, f) with `output="features"`.

        Args:
          modality: a tower's name.
          inputs: that tower's inputs, each (b, ...), whole on every process.
        """
        size = len(next(iter(inputs.values())))
        padding = -size % self.mesh.size
        padded = {name: _pad(np.asarray(array), padding) for name, array in inputs.items()}
        batch = sharding.put_whole_batch(self.mesh, padded)
        result = self._functions.get(modality, output)(self._params, self._locked, batch)
        return np.asarray(result)[:size]

    @property
    def inverse_temperature(self) -> float:
        leaves = {**self._locked, **self._params}
        return float(np.exp(np.asarray(leaves["logit_scale"])))


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """The last row again, `rows` times."""
    return np.concatenate([array, np.repeat(array[-1:], rows, axis=0)]) if rows else array


def load_encoder(workdir: Path, step: int | None = None) -> tuple[Encoder, ExperimentConfig]:
    """The model of a run at a step, by default its latest checkpoint, over all devices.

    Raises:
      ConfigError: `workdir` is not the folder of a run, or holds no checkpoint.
    """
    config = load_config(workdir)
    mesh = sharding.make_mesh(config.mesh if _fits(config) else type(config.mesh)())
    blueprint = make_blueprint(config, mesh, check_batch=False)
    saved = workdir / "checkpoints"
    if not saved.is_dir():
        raise ConfigError(f"{workdir} holds no checkpoint; train it first")
    with Checkpoints(saved, config.checkpoint, read_only=True) as checkpoints:
        found = checkpoints.latest_step if step is None else step
        if found is None:
            raise ConfigError(f"{workdir} holds no checkpoint; train it first")
        params = checkpoints.restore_params(found, blueprint.abstract_params)
    locked, sources = locked_leaves(blueprint)
    check_same_sources(workdir, sources, config)
    return Encoder(EncodeFunctions(blueprint), params, locked, found), config


def imported_encoder(config: ExperimentConfig) -> tuple[Encoder, dict[str, TowerSource]]:
    """The model of a config before any training, with the weights that it imports."""
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh), check_batch=False)
    state, locked, sources = initialise(blueprint)
    return Encoder(EncodeFunctions(blueprint), state.params, locked, 0), sources


def _fits(config: ExperimentConfig) -> bool:
    return jax.device_count() % config.mesh.fsdp == 0
