"""Embeddings of a whole source with one tower, written once and read afterwards.

A locked tower computes the same features in every epoch, so a run that reads them from a folder
saves its whole forward pass. A folder records what it was made from: the tower's weights,
everything that determines its inputs, and the source; any other folder is refused as stale.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash, to_plain
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingStore, EmbeddingWriter
from cwcl_jax.data.every_input import EveryInput, ExampleInputs
from cwcl_jax.data.options import (
    DataConfig,
    features_name,
    given_as_features,
    reads_features,
)
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.data.sources import Source, Subset
from cwcl_jax.data.survey import shape_of_features
from cwcl_jax.data.views import kept_draws
from cwcl_jax.extension import code_hash, is_reference
from cwcl_jax.training import coordination
from cwcl_jax.training.encode import Encoder
from cwcl_jax.training.state import Blueprint, TowerSource
from cwcl_jax.training.watchdog import Watchdog, unwatched

Inputs = dict[str, np.ndarray]
# Fields of a tower's settings that affect how it computes, but not what.
_NO_INFLUENCE = (
    "weights", "tune", "lora_kernels", "lora_alpha", "head", "remat", "scan_layers", "attention",
)  # fmt: skip


def folder_description(
    encoder: Encoder,
    sources: Mapping[str, TowerSource],
    source: Source,
    modality: str,
    *,
    output: str,
    dtype: str,
    shard_size: int = 8192,
) -> EmbeddingDescription:
    """Returns the description that the folder will hold.

    If training draws from a list of inputs, features are computed for all of them.
    """
    blueprint = encoder.blueprint
    inputs = blueprint.config.data.inputs_of(modality)
    every = output == "features" and not given_as_features(modality, inputs, source.embedded)
    return EmbeddingDescription(
        tower=modality,
        shape=(encoder.width(modality, output),),
        dtype=dtype,
        count=len(source),
        source=source.fingerprint(),
        weights=weights_name(
            blueprint, sources, modality, encoder.step, output, leaves=encoder.weights
        ),
        preprocessing=preprocessing(blueprint.config, modality, output),
        shard_size=shard_size,
        draws=kept_draws(modality, inputs) if every else {},
    )


def weights_name(
    blueprint: Blueprint,
    sources: Mapping[str, TowerSource],
    modality: str,
    step: int,
    output: str = "features",
    *,
    leaves: str = "trained",
) -> str:
    """Returns what a tower's values depend on: a locked encoder's file or seed, else run and step.

    Embeddings depend on the head, which trains even if the encoder is locked, or is initialised by
    the run.

    Args:
      leaves: "trained", or "ema" for the averages of the trained ones.
    """
    sha256 = sources[modality].sha256
    if output == "features" and blueprint.features_are_locked(modality):
        return sha256 or f"initialised-seed-{blueprint.config.seed}"
    begun = f"-from-{sha256[:16]}" if sha256 else ""
    averages = "" if leaves == "trained" else f"-{leaves}"
    return f"{config_hash(blueprint.config)}{begun}-step-{step}{averages}"


def preprocessing(config: ExperimentConfig, modality: str, output: str) -> dict[str, Any]:
    """Returns everything but the weights that determines a vector.

    This is the inputs, the architecture, the compute dtype and the output.
    """
    tower = {k: v for k, v in to_plain(config.towers[modality]).items() if k not in _NO_INFLUENCE}
    named = (config.towers[modality].modality, config.towers[modality].encoder)
    code = {name: code_hash(name) for name in named if is_reference(name)}
    return {
        **({"code": code} if code else {}),
        "output": output,
        "tower": tower | {"dtype": tower["dtype"] or config.dtype},
        # Vectors are computed as in evaluation.
        "inputs": config.data.inputs_of(modality).fingerprint(training=False),
    }


def embed_source(
    encoder: Encoder,
    source: Source,
    writer: EmbeddingWriter,
    data: DataConfig,
    *,
    output: str,
    batch_size: int,
    stop: Callable[[int], bool],
    watchdog: Watchdog | None = None,
    told: Counter[str] | None = None,
) -> bool:
    """Embeds the writer's missing files; returns False if it was asked to stop before the end.

    Every process embeds its own files, with its own devices. Written files stay: the next start
    continues from there.

    Args:
      stop: called after each batch with the number of examples done; True ends the work, and the
          current file is not written.
      told: receives remarks on examples for the user, with their counts.

    Raises:
      TooManyBadExamples: more than `data.max_skipped_share` of the examples are unusable. The file
          in which this shows is not written.
    """
    watchdog = watchdog or unwatched()
    told = Counter() if told is None else told
    description, unusable = writer.description, Counter[str]()
    tower, every = description.tower, bool(description.draws)
    pending = writer.pending()
    total, done, largest, start = sum(map(len, pending)), 0, 0, time.perf_counter()
    for number, rows in enumerate(pending):
        examples = EveryInput(Subset(source, rows), data, tower, every=every, batch_size=batch_size)
        ids: list[str] = []
        counts: list[int] = []
        vectors = [np.zeros((0, *description.shape), np.float32)]
        for batch, completed in _batches(examples, batch_size):
            if batch:
                largest = max(largest, len(batch))
                vectors.append(_encoded(encoder, tower, batch, output, largest))
            for example in completed:
                ids.append(example.id)
                counts.append(len(example.inputs))
                told.update(example.told)
            done += len(completed)
            _report(done, total, time.perf_counter() - start)
            watchdog.beat(f"file {number + 1} of {len(pending)}")
            if stop(done) and done < total:
                return False
        unusable.update(examples.skipped)
        _check_share(unusable, done, total, data.max_skipped_share)
        writer.write(rows, ids, np.split(np.concatenate(vectors), np.cumsum(counts)[:-1]))
    told.update({f"unusable ({kind}) and have no vector": n for kind, n in unusable.items()})
    return True


def _report(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty() or done == total:
        end = "\n" if done == total else "\r"
        rate = done / max(seconds, 1e-9)
        print(f"{done}/{total} embedded, {rate:.0f}/s", end=end, file=sys.stderr, flush=True)


def _batches(
    examples: Iterable[ExampleInputs], size: int
) -> Iterator[tuple[list[Inputs], list[ExampleInputs]]]:
    """Yields inputs, `size` at a time, and the examples whose inputs end there."""
    inputs: list[Inputs] = []
    completed: list[ExampleInputs] = []
    for example in examples:
        inputs += example.inputs
        completed.append(example)
        while len(inputs) >= size:
            ended = completed if len(inputs) == size else completed[:-1]
            yield inputs[:size], ended
            inputs, completed = inputs[size:], completed[len(ended) :]
    if completed:
        yield inputs, completed


def _encoded(
    encoder: Encoder, tower: str, inputs: Sequence[Inputs], output: str, size: int
) -> np.ndarray:
    """Returns the rows of the inputs, padded to earlier batches' size to use the same program."""
    filled = [*inputs, *[inputs[-1]] * (size - len(inputs))]
    batch = {name: np.stack([arrays[name] for arrays in filled]) for name in filled[0]}
    return encoder.encode(tower, batch, output=output)[: len(inputs)]


def all_finished(finished: bool, stop: Callable[[], bool], watchdog: Watchdog) -> bool:
    """Waits until all processes have ended their own work; returns whether all of it was done.

    Args:
      stop: called while waiting, so that a request to stop still reaches the others.
    """

    def waiting() -> None:
        watchdog.beat("waiting for the other processes")
        stop()

    return set(coordination.meet("embedded", str(finished), waiting)) == {"True"}


def _check_share(unusable: Counter[str], done: int, total: int, limit: float) -> None:
    """Raises TooManyBadExamples at the end, also for the few that a share does not cover before.

    One example may always be bad, unless the limit is 0: it has a row without a vector.
    """
    count = unusable.total()
    if done == total and count > max(1 if limit else 0, limit * total):
        kinds = ", ".join(f"{kind}: {number}" for kind, number in sorted(unusable.items()))
        raise TooManyBadExamples(
            f"{count} of {total} examples are unusable ({kinds}), a larger share than "
            f"data.max_skipped_share={limit}. Repair the data, or raise this limit."
        )


def check_features(
    blueprint: Blueprint,
    source: Source,
    sources: Mapping[str, TowerSource],
    *,
    towers: Collection[str] = (),
    what: str = "config.data.train",
    step: int = 0,
    leaves: str = "trained",
) -> None:
    """Raises ConfigError if a source's features are not those that a tower reads.

    They must have the shape of the tower's inputs, or be what its encoder would compute.

    Args:
      towers: the towers whose features are read; by default all.
      what: names the source in errors.
      step: step of the run; 0 at the beginning.
      leaves: as for `weights_name`.
    """
    config = blueprint.config
    for tower in towers or config.towers:
        if not from_cache(config, tower, source):
            _check_shape(config, tower, source, what)
            continue
        stores = source.stores.get(tower, ())
        if not stores:
            raise ConfigError(
                f"{what} provides features for the tower {tower!r}, but it is unknown whether its "
                f"encoder {config.towers[tower].encoder!r} computed them: set "
                f"config.towers.{tower}.encoder='precomputed' to use them as inputs, compute them "
                "with python -m cwcl_jax.embed, or, if they are raw inputs, declare them in the "
                "source line (raw=NAME)"
            )
        for store in stores:
            _check_store(blueprint, tower, store, sources, what, step, leaves)


def _check_shape(config: ExperimentConfig, tower: str, source: Source, what: str) -> None:
    """Raises ConfigError if the features that a tower reads as inputs have another shape."""
    inputs = config.data.inputs_of(tower)
    if not (reads_features(inputs) and given_as_features(tower, inputs, source.embedded)):
        return
    name = features_name(tower, inputs)
    try:
        shape = shape_of_features(source, name)
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
    wanted = inputs.arrays()["features"].shape
    if wanted and shape != wanted:
        raise ConfigError(
            f"{what} has features {name!r} of shape {shape} in each example, the {tower} tower "
            f"reads {wanted}: set config.towers.{tower}.overrides (a vector's width), or name "
            "other features in the source line"
        )


def from_cache(config: ExperimentConfig, tower: str, source: Source) -> bool:
    """Returns whether the source has features that replace a tower's raw inputs."""
    return tower in source.embedded and not reads_features(config.data.inputs_of(tower))


def _check_store(
    blueprint: Blueprint,
    tower: str,
    store: EmbeddingStore,
    sources: Mapping[str, TowerSource],
    what: str,
    step: int,
    leaves: str,
) -> None:
    if not step and not blueprint.features_are_locked(tower):
        raise ConfigError(
            f"{what} reads {tower} features from {store.folder}, but the {tower} tower "
            f"trains: set config.towers.{tower}.tune to 'none' or 'head', or leave out "
            "features_from="
        )
    try:
        store.description.require(
            store.folder,
            weights=weights_name(blueprint, sources, tower, step, leaves=leaves),
            preprocessing=preprocessing(blueprint.config, tower, "features"),
        )
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
