"""Embeddings of a whole source with one tower, written once and read ever after.

A locked tower gives the same features in every epoch, so that a run that reads them from a folder
saves its whole forward pass. A folder knows what it was made from: the tower's weights, all that
decides its inputs, and the source; anything else is refused as stale.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash, to_plain
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingStore, EmbeddingWriter
from cwcl_jax.data.options import DataConfig, reads_features
from cwcl_jax.data.pipeline import eval_batches
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.data.sources import Source, Subset
from cwcl_jax.extension import code_hash, is_reference
from cwcl_jax.modalities.features import only_features
from cwcl_jax.training import coordination
from cwcl_jax.training.encode import Encoder
from cwcl_jax.training.state import Blueprint, TowerSource
from cwcl_jax.training.watchdog import Watchdog, unwatched

# Fields of a tower's settings that decide how it computes, but not what.
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
    width: int,
    shard_size: int,
) -> EmbeddingDescription:
    """What the folder will say about itself."""
    blueprint = encoder.blueprint
    return EmbeddingDescription(
        tower=modality,
        shape=(width,),
        dtype=dtype,
        count=len(source),
        source=source.fingerprint(),
        weights=weights_name(blueprint, sources, modality, encoder.step, output),
        preprocessing=preprocessing(blueprint.config, modality, output),
        shard_size=shard_size,
    )


def weights_name(
    blueprint: Blueprint,
    sources: Mapping[str, TowerSource],
    modality: str,
    step: int,
    output: str = "features",
) -> str:
    """What the tower's values are: a locked encoder's file or seed, else the run and its step.

    Embeds have passed through the head, which trains even where the encoder is locked, or is
    initialised by the run.
    """
    sha256 = sources[modality].sha256
    if output == "features" and blueprint.features_are_locked(modality):
        return sha256 or f"initialised-seed-{blueprint.config.seed}"
    begun = f"-from-{sha256[:16]}" if sha256 else ""
    return f"{config_hash(blueprint.config)}{begun}-step-{step}"


def preprocessing(config: ExperimentConfig, modality: str, output: str) -> dict[str, Any]:
    """All but the weights that decides a vector: inputs, architecture, compute type, output."""
    tower = {k: v for k, v in to_plain(config.towers[modality]).items() if k not in _NO_INFLUENCE}
    named = (config.towers[modality].modality, config.towers[modality].encoder)
    code = {name: code_hash(name) for name in named if is_reference(name)}
    return {
        **({"code": code} if code else {}),
        "output": output,
        "tower": tower | {"dtype": tower["dtype"] or config.dtype},
        # Vectors are made as in evaluation.
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
    progress: Callable[[int, int, float], None],
    stop: Callable[[int], bool],
    watchdog: Watchdog | None = None,
    told: Counter[str] | None = None,
) -> bool:
    """Embeds what is missing of the writer's files; False if asked to stop before the end.

    Every process embeds the files that are its own, with the devices that are its own. What was
    written stays: the next start goes on from there.

    Args:
      stop: called after each batch with the vectors done; True ends the work, and the file begun
        is left out.
      progress: called with vectors done now, vectors to do, and seconds so far.
      told: receives what a person should know of some examples, with their number.

    Raises:
      TooManyBadExamples: more than `data.max_skipped_share` of the examples are unusable. The file
        in which that shows is not written.
    """
    watchdog = watchdog or unwatched()
    told = Counter() if told is None else told
    tower, unusable = writer.description.tower, Counter[str]()
    pending = writer.pending()
    total, done, start = sum(map(len, pending)), 0, time.perf_counter()
    for number, rows in enumerate(pending):
        ids: list[str] = []
        vectors, valid = [], []
        batches = eval_batches(Subset(source, rows), data, (tower,), batch_size=batch_size)
        for batch in _trimmed(batches, len(rows)):
            vectors.append(encoder.encode(tower, batch[tower], output=output))
            told.update(_remarks(batch, tower, data))
            ids += batch["id"]
            valid.append(batch["valid"])
            done += len(batch["id"])
            progress(done, total, time.perf_counter() - start)
            watchdog.beat(f"file {number + 1} of {len(pending)}")
            if stop(done) and done < total:
                return False
        unusable.update(batches.skipped)
        _check_share(unusable, done, total, data.max_skipped_share)
        writer.write(rows, ids, np.concatenate(vectors), np.concatenate(valid))
    told.update({f"unusable ({kind}) and have no vector": n for kind, n in unusable.items()})
    return True


def all_finished(finished: bool, stop: Callable[[], bool], watchdog: Watchdog) -> bool:
    """Waits until all processes have ended their own work; whether all of it was done.

    Args:
      stop: called while waiting, so that a request to stop still reaches the others.
    """

    def waiting() -> None:
        watchdog.beat("waiting for the other processes")
        stop()

    return set(coordination.meet("embedded", str(finished), waiting)) == {"True"}


def _trimmed(batches: Any, count: int) -> Iterator[dict[str, Any]]:
    """The batches without the filling of the last one."""
    for batch in batches:
        rows = min(len(batch["id"]), count)
        count -= rows
        lists = {name: batch[name][:rows] for name in ("id", "captions", "lost")}
        yield jax.tree.map(lambda leaf, rows=rows: leaf[:rows], _arrays(batch)) | lists


def _remarks(batch: Mapping[str, Any], tower: str, data: DataConfig) -> Iterator[str]:
    """What a person should know of the usable examples of a batch, a remark for each."""
    texts = data.inputs_of(tower).field == "text" and not only_features(batch[tower])
    for row in np.flatnonzero(batch["valid"]):
        yield from batch["lost"][row].get(tower, ())
        if texts and len(set(batch["captions"][row])) > 1:
            yield "with several captions, of which the first is embedded"
    if not only_features(batch[tower]):
        for remark, rows in data.inputs_of(tower).remarks(batch[tower]).items():
            yield from [remark] * int(np.sum(rows & batch["valid"]))


def _check_share(unusable: Counter[str], done: int, total: int, limit: float) -> None:
    """Raises TooManyBadExamples; at the end also for the few that a share says nothing of before.

    One example may always be bad, unless the limit is 0: it has a row without a vector.
    """
    count = unusable.total()
    if done == total and count > max(1 if limit else 0, limit * total):
        kinds = ", ".join(f"{kind}: {number}" for kind, number in sorted(unusable.items()))
        raise TooManyBadExamples(
            f"{count} of {total} examples are unusable ({kinds}), more than the share "
            f"data.max_skipped_share={limit} allows. Repair the data, or give a larger share."
        )


def _arrays(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray | Mapping)}


def check_features(
    blueprint: Blueprint,
    source: Source,
    sources: Mapping[str, TowerSource],
    *,
    towers: Collection[str] = (),
    what: str = "config.data.train",
    step: int = 0,
) -> None:
    """Raises ConfigError where a source gives features that the tower's encoder would not give.

    Args:
      towers: whose features are read; by default all.
      what: names the source in errors.
      step: of the run; 0 where it begins.
    """
    config = blueprint.config
    for tower in towers or config.towers:
        if not from_cache(config, tower, source):
            continue
        stores = source.stores.get(tower, ())
        if not stores:
            raise ConfigError(
                f"{what} gives features for the tower {tower!r}, but nothing says that "
                f"its encoder {config.towers[tower].encoder!r} made them: set "
                f"config.towers.{tower}.encoder='precomputed' to take them as inputs, make them "
                "with python -m cwcl_jax.embed, or, where they are raw inputs, say so in the "
                "source line (raw=NAME)"
            )
        for store in stores:
            _check_store(blueprint, tower, store, sources, what, step)


def from_cache(config: ExperimentConfig, tower: str, source: Source) -> bool:
    """Whether the source gives features that stand for a tower's raw inputs."""
    return tower in source.embedded and not reads_features(config.data.inputs_of(tower))


def _check_store(
    blueprint: Blueprint,
    tower: str,
    store: EmbeddingStore,
    sources: Mapping[str, TowerSource],
    what: str,
    step: int,
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
            weights=weights_name(blueprint, sources, tower, step),
            preprocessing=preprocessing(blueprint.config, tower, "features"),
        )
    except ValueError as error:
        raise ConfigError(f"{what}: {error}") from error
