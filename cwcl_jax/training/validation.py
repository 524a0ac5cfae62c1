"""The held-out loss: a few global batches of other examples, the same ones each time.

Batches are as large as training's, because loss and accuracy depend on their size, and nothing in
them is random: no dropout, crops or choice among captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.held_out import hold_out, shared_with_neighbours
from cwcl_jax.data.overlap import shared_examples
from cwcl_jax.data.pipeline import TrainBatches, train_batches
from cwcl_jax.data.processing import Processor
from cwcl_jax.data.sources import Source, open_source
from cwcl_jax.training import sharding
from cwcl_jax.training.state import Blueprint, Leaves, TrainState
from cwcl_jax.training.step import GradientFunction

_ROWS = 1024


def split_source(config: ExperimentConfig, source: Source) -> tuple[Source, Source | None]:
    """Returns the training source and the validation source, None if there is none.

    Args:
      source: the source of `config.data.train`.

    Raises:
      ConfigError: the validation cannot be read, or a share of nothing is held out.
    """
    data = config.data
    if data.validation_share:
        try:
            return hold_out(source, data.validation_share, config.seed)
        except ValueError as error:
            raise ConfigError(f"config.data.{error}") from error
    if not data.validation:
        return source, None
    try:
        return source, open_source(data.validation, cache_dir=data.cache_dir)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"config.data.validation={data.validation!r}: {reason}; set "
            "--config.data.validation=..."
        ) from error


def overlap(config: ExperimentConfig, train: Source, held: Source) -> str:
    """Returns a note on which validation data is also trained on; "" if none was found."""
    raw = Processor(config.data, config.tower_names, held.embedded).raw
    fields = {modality.field for modality in raw.values()}
    if config.data.validation_share:
        return shared_with_neighbours(held, fields - {"text"})
    # A picture is still the same with another of its captions.
    return shared_examples(train, held, fields - {"text"} or fields)


def validation_batches(config: ExperimentConfig, held: Source) -> TrainBatches:
    """Returns this host's part of the validation's batches.

    Raises:
      ConfigError: there is less than a batch of examples, or towers cannot read them.
    """
    if len(held) < config.global_batch_size:
        field = "validation_share" if config.data.validation_share else "validation"
        raise ConfigError(
            f"config.data.{field}={getattr(config.data, field)!r} gives {len(held)} examples, "
            f"fewer than a batch of {config.global_batch_size}: loss and accuracy depend on the "
            "batch size, so it needs more"
        )
    line = config.data.validation or config.data.train
    composed = config.data.validation_composed
    data = dataclasses.replace(
        config.data,
        train=line,
        examples_per_epoch=0,
        shuffle=True,
        batches=config.data.batches if composed else "",
        mixture_temperature=config.data.mixture_temperature if config.data.validation_share else 1,
    )
    try:
        return train_batches(
            data,
            config.tower_names,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=held,
            random=False,
        )
    except ValueError as error:
        raise ConfigError(f"config.data.validation: {error}") from error


class Validation:
    """Measures the held-out loss of a state.

    Attributes:
      count: number of global batches in one measurement.
    """

    def __init__(self, blueprint: Blueprint, batches: TrainBatches, beat: Callable[[], None]):
        """Prepares the measurement; nothing is read or compiled before the first one.

        Args:
          beat: called before each batch, for the watchdog.
        """
        config = blueprint.config
        self._blueprint = blueprint
        self._batches = batches
        self._beat = beat
        self.count = min(config.data.validation_batches, batches.steps_per_epoch)
        self._measure = _measure(blueprint)
        self._jitted = jax.jit(self._measure, out_shardings=sharding.replicated(blueprint.mesh))

    def run(self, state: TrainState, locked: Leaves) -> dict[str, float]:
        """Returns means over the batches, as `validation/NAME` and `validation_ema/NAME`."""
        of = {"validation": state.model_leaves}
        if state.ema:
            of["validation_ema"] = state.ema_leaves
        found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in of}
        self._batches.set_state({"step": 0})
        for _ in range(self.count):
            self._beat()
            batch = dict(next(self._batches))
            del batch["index"]
            arrays = sharding.put_batch(self._blueprint.mesh, batch)
            for name, leaves in of.items():
                found[name].append(self._jitted({**locked, **leaves}, arrays, state.step))
        self._batches.close()
        return {
            f"{name}/{metric}": float(np.mean([float(values[metric]) for values in batches]))
            for name, batches in jax.device_get(found).items()
            for metric in batches[0]
        }

    def names(self) -> dict[str, Any]:
        """Returns the names of the values of `run`, as keys; reads a batch, for its shapes."""
        size = self._blueprint.config.global_batch_size
        self._batches.set_state({"step": 0})
        # In the dtypes that they have on a device: example numbers are int64 here.
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)
            ),
            dict(next(self._batches)),
        )
        self._batches.close()
        abstract = self._blueprint.abstract_state()
        leaves = {**self._blueprint.abstract_locked, **abstract.model_leaves}
        metrics = jax.eval_shape(self._measure, leaves, batch, abstract.step)
        prefixes = ["validation", *(["validation_ema"] if abstract.ema else [])]
        return {f"{prefix}/{name}": None for prefix in prefixes for name in metrics}

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of different unusable examples by kind, on this host."""
        return self._batches.skipped

    def close(self) -> None:
        """Ends the reader threads."""
        self._batches.close()


def _measure(blueprint: Blueprint) -> Callable[..., dict[str, jax.Array]]:
    function = GradientFunction(blueprint)
    u, v = blueprint.config.tower_names

    def measure(leaves: Leaves, batch: Mapping[str, Any], step: jax.Array) -> dict[str, jax.Array]:
        embeds, metrics = function.held_out(leaves, batch, step)
        everywhere = sharding.replicated(blueprint.mesh)
        one, other = (jax.lax.with_sharding_constraint(embeds[t], everywhere) for t in (u, v))
        return metrics | {
            "recall_at_1_u_to_v": recall_at_1(one, other),
            "recall_at_1_v_to_u": recall_at_1(other, one),
        }

    return measure


def recall_at_1(queries: Float[Array, "b d"], items: Float[Array, "b d"]) -> Float[Array, ""]:
    """Returns the share of queries that are nearer to their own item than to any other one.

    Unlike the loss's accuracy, it has no temperature, bias or masked pairs.
    """
    count = queries.shape[0]
    own = jnp.sum(queries * items, axis=1)

    def is_first(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        number, query, mine = row
        cosines = items @ query
        return jnp.all((cosines < mine) | (jnp.arange(count) == number))

    found = jax.lax.map(is_first, (jnp.arange(count), queries, own), batch_size=min(_ROWS, count))
    return jnp.mean(found.astype(jnp.float32))
