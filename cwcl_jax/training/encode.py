"""Embeddings of a model over the mesh, for evaluation and for use after training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cwcl_jax import compiling
from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.modalities.features import only_features
from cwcl_jax.models.lora import effective
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.own_code import check_same_code
from cwcl_jax.training.state import (
    Blueprint,
    Leaves,
    TowerSource,
    initialise,
    locked_leaves,
    make_blueprint,
)
from cwcl_jax.training.workdir import check_same_sources, load_config, read_record

# The leaves of a run that can be chosen, and the name of a step that is not a number.
WEIGHTS = ("trained", "ema")
BEST = "best"


class EncodeFunctions:
    """Compiled encoders of a blueprint's towers, kept between evaluations."""

    def __init__(self, blueprint: Blueprint):
        self.blueprint = blueprint
        self._jitted: dict[tuple[str, str], Any] = {}

    def get(self, modality: str, output: str) -> Any:
        """Returns `f(params, locked, inputs) -> (b, width)`, float32, replicated."""
        if modality not in self.blueprint.config.towers:
            raise ValueError(
                f"the model has no {modality!r} tower; it has "
                f"{sorted(self.blueprint.config.towers)}"
            )
        key = (modality, output)
        if key not in self._jitted:
            mesh = self.blueprint.mesh
            self._jitted[key] = jax.jit(
                self._function(modality, output),
                out_shardings=sharding.replicated(mesh),
                compiler_options=compiling.options(mesh.devices.flat[0].platform),
            )
        return self._jitted[key]

    def _function(self, modality: str, output: str) -> Any:
        def encode(params: Leaves, locked: Leaves, inputs: Mapping[str, Any]) -> jax.Array:
            leaves = sharding.whole(self.blueprint.mesh, {**params, **locked})
            tower = self.blueprint.model_def.merge(leaves).towers[modality]
            features = tower.features(inputs)
            result = features if output == "features" else tower.project(features)
            return result.astype(jnp.float32)

        return encode


class Encoder:
    """A trained model as functions from host arrays to host arrays.

    Attributes:
      blueprint: structure of the model.
      mesh: devices; batches of any size are padded to a multiple of their number.
      step: number of training steps done.
      weights: which leaves of that step these are, one of `WEIGHTS`.
      on_batch: called before each batch, equally often on all processes.
    """

    def __init__(
        self,
        functions: EncodeFunctions,
        params: Leaves,
        locked: Leaves,
        step: int,
        weights: str = "trained",
    ):
        self._functions = functions
        self._params = params
        self._locked = locked
        self.blueprint = functions.blueprint
        self.mesh = functions.blueprint.mesh
        self.step = step
        self.weights = weights
        self.on_batch: Callable[[], None] = lambda: None

    def encode(
        self, modality: str, inputs: Mapping[str, np.ndarray], *, output: str = "embeds"
    ) -> np.ndarray:
        """Returns the embeddings (b, d) of one batch, float32.

        With `output="features"`, returns the features (b, f) before the head.

        Args:
          modality: name of the tower.
          inputs: the tower's inputs, each (b, ...); every process has the whole batch.
        """
        self.on_batch()
        if not only_features(inputs):
            inputs = self.blueprint.config.data.inputs_of(modality).trim(inputs)
        size = len(next(iter(inputs.values())))
        padding = -size % self.mesh.size
        padded = {name: _pad(np.asarray(array), padding) for name, array in inputs.items()}
        batch = sharding.put_whole_batch(self.mesh, padded)
        result = self._functions.get(modality, output)(self._params, self._locked, batch)
        return np.asarray(result)[:size]

    def width(self, modality: str, output: str = "embeds") -> int:
        """Returns the width of the rows of `encode`."""
        if output == "embeds":
            return self.blueprint.config.embed_dim
        model = self.blueprint.model_def.merge(self.blueprint.abstract)
        return model.towers[modality].feature_width

    @property
    def inverse_temperature(self) -> float:
        leaves = {**self._locked, **self._params}
        return float(np.exp(np.asarray(leaves["logit_scale"])))


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """Returns the array with its last row repeated `rows` times at the end."""
    return np.concatenate([array, np.repeat(array[-1:], rows, axis=0)]) if rows else array


@dataclasses.dataclass(frozen=True)
class Restored:
    """The model of a run at a step; the blueprint's config has the sizes from the towers' files.

    Attributes:
      params: the leaves that a run changes: trained ones and running statistics.
    """

    blueprint: Blueprint
    params: Leaves
    locked: Leaves
    step: int

    @property
    def plain(self) -> Leaves:
        """The model's leaves as in `blueprint.model_def.plain`, with LoRA's sums in the kernels."""
        return effective({**self.params, **self.locked}, self.blueprint.model_def.adapters)


def restore(
    workdir: Path,
    step: int | str | None = None,
    *,
    weights: str = "trained",
    devices: Sequence[Any] | None = None,
    compact: bool = True,
) -> Restored:
    """Returns the model of a run at a step, by default its latest checkpoint, over all devices.

    Args:
      step: a number, or "best" for the one that `checkpoint.best` kept.
      weights: "trained", or "ema" for the averages of the trained leaves.
      compact: see `make_blueprint`.

    Raises:
      ConfigError: `workdir` is not the folder of a run, or has no checkpoint, best step or
          averages.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    config = load_config(workdir)
    mesh = _encoding_mesh(config, devices)
    blueprint = make_blueprint(config, mesh, check_batch=False, compact=compact)
    saved = workdir / "checkpoints"
    if not saved.is_dir():
        raise ConfigError(f"{workdir} holds no checkpoint; train it first")
    with Checkpoints(saved, config.checkpoint, read_only=True) as checkpoints:
        found = _best_step(checkpoints, config) if step == BEST else step
        found = checkpoints.latest_step if found is None else int(found)
        if found is None:
            raise ConfigError(f"{workdir} holds no checkpoint; train it first")
        params = checkpoints.restore_model(found, blueprint.abstract_state(), weights)
    locked, sources = locked_leaves(blueprint)
    check_same_sources(workdir, sources, config)
    check_same_code(
        workdir, config, ("towers",), f"or remove {workdir / 'code.json'} to take it as it is now"
    )
    return Restored(blueprint, params, locked, found)


def _best_step(checkpoints: Checkpoints, config: ExperimentConfig) -> int:
    best = checkpoints.best() or {}
    if best.get("step") is None:
        asked = config.checkpoint.best
        why = (
            f"measured no {asked} yet"
            if asked
            else "has no best step: config.checkpoint.best is not set"
        )
        raise ConfigError(f"step=best: the run {why}; its steps are {checkpoints.steps}")
    return best["step"]


def load_encoder(
    workdir: Path,
    step: int | str | None = None,
    *,
    weights: str = "trained",
    devices: Sequence[Any] | None = None,
) -> tuple[Encoder, ExperimentConfig]:
    """Returns the model of `restore` as an encoder, with the run's settings."""
    model = restore(workdir, step, weights=weights, devices=devices)
    functions = EncodeFunctions(model.blueprint)
    encoder = Encoder(functions, model.params, model.locked, model.step, weights)
    return encoder, load_config(workdir)


def tower_sources(workdir: Path) -> dict[str, TowerSource]:
    """Returns the origin of the weights of a run's towers."""
    return {
        modality: TowerSource(record["source"], record["sha256"])
        for modality, record in read_record(workdir / "towers.json").items()
    }


def imported_encoder(
    config: ExperimentConfig, *, devices: Sequence[Any] | None = None
) -> tuple[Encoder, dict[str, TowerSource]]:
    """Returns the untrained model of a config, with the weights that it imports."""
    blueprint = make_blueprint(config, _encoding_mesh(config, devices), check_batch=False)
    state, locked, sources = initialise(blueprint)
    return Encoder(EncodeFunctions(blueprint), state.model_leaves, locked, 0), sources


def _encoding_mesh(config: ExperimentConfig, devices: Sequence[Any] | None) -> Mesh:
    """Returns the run's own mesh if the available devices fit it, else a mesh without `fsdp`."""
    count = jax.device_count() if devices is None else len(devices)
    fits = count % config.mesh.fsdp == 0
    return sharding.make_mesh(config.mesh if fits else MeshConfig(), devices)
