"""Trains heads on stored features of locked encoders: features, batches, and a scan over steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.order import GlobalOrder
from cwcl_jax.evaluation.runner import run_tasks
from cwcl_jax.losses.short_names import loss_fields
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.recipes import require
from cwcl_jax.training import sharding
from cwcl_jax.training.encode import EncodeFunctions, Encoder
from cwcl_jax.training.feature_cache import FeatureCache
from cwcl_jax.training.features import training_source
from cwcl_jax.training.state import (
    Blueprint,
    Leaves,
    TowerSource,
    TrainState,
    initialise,
    make_blueprint,
)
from cwcl_jax.training.step import TrainStep

_CHUNK = 50
_NEAREST = 10
# The head and the tuned part of the locked side's tower.
_PROJECTED = {"trained": ("linear", "head"), "mlp": ("mlp", "head"), "none": ("none", "none")}
Rows = Int[np.ndarray, "steps b"]
Chunk = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the training data from both encoders."""

    u: Float[np.ndarray, "n k"]
    v: Float[np.ndarray, "n f"]


def read_features(config: ExperimentConfig) -> Features:
    """Returns features of both modalities of `config.data.train`; missing ones are computed."""
    source = training_source(config)
    stores = {tower: found[0] for tower, found in source.stores.items()}
    if set(stores) != set(config.towers):
        raise ConfigError(
            "heads are compared on features of locked encoders: use a config with both encoders "
            "locked and data.keep_locked_features=True, such as speech_cwcl.py:head,init=RUN"
        )
    arrays = {}
    for modality, store in stores.items():
        vectors = [store.variants(i)[1] for i in range(len(store))]
        if any(len(found) > 1 for found in vectors):
            raise ConfigError(
                f"heads are compared on one vector an example, and {store.folder} holds several "
                "of some: leave out views, and keep one caption"
            )
        none = np.full((1, store.description.shape[0]), np.nan, np.float32)
        arrays[modality] = np.concatenate([v if len(v) else none for v in vectors])
    usable = np.all([np.isfinite(array).all(axis=1) for array in arrays.values()], axis=0)
    u, v = (arrays[modality][usable].astype(np.float32) for modality in config.tower_names)
    return Features(u, v)


def batches(features: Features, config: ExperimentConfig, *, group: int) -> Iterator[Rows]:
    """Yields rows of the training data for chunks of steps; they depend only on the seed."""
    count, size = len(features.u), config.global_batch_size
    check_batch(count, size, group)
    anchors = size // group
    order = GlobalOrder((count,), (float(count),), count, config.seed)
    nearest = nearest_rows(features.u, _neighbours(group)) if group > 1 else None
    per_epoch = count // anchors
    for first in range(0, config.total_steps, _CHUNK):
        chosen = []
        for step in range(first, min(first + _CHUNK, config.total_steps)):
            epoch, place = divmod(step, per_epoch)
            rows = order.indices(epoch, np.arange(place * anchors, (place + 1) * anchors))
            if nearest is not None:
                draws = np.random.default_rng((config.seed, step))
                picked = draws.permuted(nearest[rows], axis=1)[:, : group - 1]
                rows = np.concatenate([rows[:, None], picked], axis=1).ravel()
            chosen.append(rows)
        yield np.stack(chosen)


def check_batch(count: int, size: int, group: int) -> None:
    """Raises ConfigError unless batches of `size` can be drawn from `count` rows."""
    if size % group:
        raise ConfigError(f"--group={group} does not divide the batch of {size}")
    least = max(size // group, _neighbours(group) + 1 if group > 1 else 1)
    if count < least:
        raise ConfigError(
            f"a batch of {size} in groups of {group} needs {least} rows, the training data has "
            f"{count}: lower --batches or --group"
        )


def _neighbours(group: int) -> int:
    return max(_NEAREST, group - 1)


def nearest_rows(u: Float[np.ndarray, "n k"], wanted: int) -> Int[np.ndarray, "n {wanted}"]:
    """Returns the nearest other rows by cosine."""
    unit = u / np.linalg.norm(u, axis=1, keepdims=True)
    found = []
    for first in range(0, len(unit), 1024):
        cosine = unit[first : first + 1024] @ unit.T
        cosine[np.arange(len(cosine)), first + np.arange(len(cosine))] = -2
        found.append(np.argpartition(-cosine, wanted, axis=1)[:, :wanted])
    return np.concatenate(found)


def make_chunk(blueprint: Blueprint) -> Chunk:
    """Returns `state, metrics = chunk(state, locked, u, v, rows)`, a scan over steps."""
    u_name, v_name = blueprint.config.tower_names
    train_step = TrainStep(blueprint)

    def chunk(state: TrainState, locked: Leaves, u: Any, v: Any, rows: Any) -> Any:
        def step(state: TrainState, rows: Any) -> tuple[TrainState, Any]:
            batch = {u_name: {"features": u[rows]}, v_name: {"features": v[rows]}}
            return train_step.update(state, locked, batch)

        state, metrics = jax.lax.scan(step, state, rows)
        return state, {name: values[-1] for name, values in metrics.items()}

    return jax.jit(chunk)


@dataclasses.dataclass(frozen=True)
class Head:
    """The settings of one head, without its seed.

    Attributes:
      loss: short name, see `losses.short_names`.
      projection: of the side that gives the weights: "trained" (linear), "mlp" or "none".
      batch: pairs in a step.
      group: size of groups of near duplicates in a batch; 1 for no groups.
      steps: number of training steps.
    """

    loss: str
    projection: str
    batch: int
    group: int
    steps: int

    def variant(self, config: ExperimentConfig, seed: int) -> ExperimentConfig:
        """Returns the config with this head.

        The learning rate is proportional to the batch, and the warm-up to the steps.

        Raises:
          ConfigError: there is no such loss, projection, batch or number of steps.
        """
        for flag, value in (("batches", self.batch), ("steps", self.steps)):
            if value < 1:
                raise ConfigError(f"--{flag}={value}: at least 1")
        require("--projections", self.projection, tuple(_PROJECTED))
        try:
            loss = dataclasses.replace(
                config.loss, **({"weight_function": ""} | loss_fields(self.loss))
            )
        except ValueError as error:
            raise ConfigError(f"--losses={self.loss}: {error}") from error
        optimizer = dataclasses.replace(
            config.optimizer,
            learning_rate=config.optimizer.learning_rate * self.batch / config.global_batch_size,
            warmup_steps=round(config.optimizer.warmup_steps * self.steps / config.total_steps),
        )
        tasks = {
            name: dataclasses.replace(task, bootstrap=0)
            for name, task in config.evaluation.tasks.items()
        }
        return dataclasses.replace(
            config,
            seed=seed,
            global_batch_size=self.batch,
            total_steps=self.steps,
            towers=_projected(config, self.projection),
            loss=loss,
            optimizer=optimizer,
            evaluation=dataclasses.replace(config.evaluation, tasks=tasks),
        )


def _projected(config: ExperimentConfig, projection: str) -> dict[str, TowerConfig]:
    """Returns the towers with the projection on the side that gives the weights."""
    side = config.loss.weights_from
    head, tune = _PROJECTED[projection]
    changed = dataclasses.replace(config.towers[side], head=head, tune=tune)
    return {name: changed if name == side else tower for name, tower in config.towers.items()}


class HeadRuns:
    """Trains and evaluates heads for one config; features and programs are shared."""

    def __init__(self, config: ExperimentConfig):
        self.config = config
        self.features = read_features(config)
        self._arrays = jax.device_put((self.features.u, self.features.v))
        self._mesh = sharding.make_mesh(config.mesh, jax.local_devices()[:1])
        self._chunks: dict[Head, Chunk] = {}
        self._functions: dict[tuple[str, str], EncodeFunctions] = {}
        self._kept: FeatureCache | None = None
        self._begun: dict[Any, tuple[Blueprint, TrainState, Leaves, dict[str, TowerSource]]] = {}

    def run(self, head: Head, seed: int) -> dict[str, float]:
        """Returns the metrics of one head, with the last step's diagnostics as `train/NAME`."""
        config = head.variant(self.config, seed)
        blueprint, state, locked, sources = self._begin(head, config)
        chunk = self._chunks.setdefault(head, make_chunk(blueprint))
        metrics: Mapping[str, Any] = {}
        for rows in batches(self.features, config, group=head.group):
            state, metrics = chunk(state, locked, *self._arrays, jnp.asarray(rows))
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        kind = head.projection, config.loss.name  # a sigmoid loss has a leaf more
        functions = self._functions.setdefault(kind, EncodeFunctions(blueprint))
        encoder = Encoder(functions, state.model_leaves, locked, config.total_steps)
        self._kept = self._kept or FeatureCache(encoder, sources)
        self._kept.encoder = encoder
        results = run_tasks(
            config.evaluation,
            encode=self._kept.encode,
            data=config.data,
            features=partial(self._kept.encode, output="features"),
            weights_from=config.loss.weights_from,
        )
        self._kept.save()
        return values | {name: v for result in results for name, v in result.flat().items()}

    def _begin(
        self, head: Head, config: ExperimentConfig
    ) -> tuple[Blueprint, TrainState, Leaves, dict[str, TowerSource]]:
        """Returns structure and initial state of a head, cached by kind of loss and seed."""
        key = head.projection, config.loss.name, config.seed
        if key not in self._begun:
            if any(seed != config.seed for *_, seed in self._begun):
                self._begun.clear()  # each entry holds the locked towers
            blueprint = make_blueprint(config, self._mesh)
            self._begun[key] = blueprint, *initialise(blueprint)
        blueprint, state, locked, sources = self._begun[key]
        own = dataclasses.replace(config, towers=blueprint.config.towers)
        return dataclasses.replace(blueprint, config=own), state, locked, sources
