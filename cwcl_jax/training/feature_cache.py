"""The feature cache: features of locked encoders, stored in the user's cache folder.

Features of training data are stored by the examples' positions, those of evaluations by a hash of
the inputs, so that any run with the same encoder encodes prompts and test items only once. Both are
in folders of `data.embeddings` whose names are hashes of everything that determines the vectors, so
that a folder is never stale. `python -m cwcl_jax.embed` writes such folders anywhere else.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.copies import cache_home
from cwcl_jax.data.content import row_keys
from cwcl_jax.data.embeddings import (
    EmbeddingDescription,
    EmbeddingStore,
    EmbeddingWriter,
    in_dtype,
)
from cwcl_jax.data.sources import Source
from cwcl_jax.files import locked, side_output
from cwcl_jax.modalities.features import only_features
from cwcl_jax.training.coordination import gather, meet
from cwcl_jax.training.distributed import is_primary
from cwcl_jax.training.embedding import embed_source, preprocessing, weights_name
from cwcl_jax.training.encode import Encoder
from cwcl_jax.training.state import TowerSource

_LOG = logging.getLogger(__name__)
_BATCH = 256
# Instead of a source's fingerprint, for rows that belong to inputs.
_BY_CONTENT = "inputs"


def cache_folder(config: ExperimentConfig) -> Path:
    """Returns the folder of the cached features."""
    return cache_home(config.data.cache_dir) / "features"


def _place(config: ExperimentConfig, description: EmbeddingDescription) -> Path:
    name = hashlib.sha256(description.to_json().encode()).hexdigest()[:16]
    return cache_folder(config) / f"{description.tower}-{name}"


def keep(
    config: ExperimentConfig,
    encoder: Encoder,
    source: Source,
    description: EmbeddingDescription,
    beat: Callable[[], None],
) -> Path:
    """Computes the missing features of a source; returns the complete folder.

    Every process of a job writes its share. If processes do not share a folder, each of them then
    writes the rest, because any example may occur in its part of a batch.

    Args:
      encoder: an encoder on devices of this process only.
      beat: called regularly, for the watchdog.
    """
    folder = _place(config, description)
    folder.parent.mkdir(parents=True, exist_ok=True)
    index, count = jax.process_index(), jax.process_count()
    for part, parts in dict.fromkeys([(index, count), (0, 1)]):
        if (part, parts) != (index, count):
            meet(f"features/{folder.name}", "", beat)
        lock = f"{folder.name}.lock" if parts == 1 else f"{folder.name}-{part}-of-{parts}.lock"
        # Other runs wait. Whoever holds the lock is supervised by its own watchdog.
        with locked(folder.with_name(lock), waiting=beat):
            _write(
                EmbeddingWriter(folder, description, process_index=part, process_count=parts),
                config, encoder, source, beat,
            )  # fmt: skip
    return folder


def _write(
    writer: EmbeddingWriter,
    config: ExperimentConfig,
    encoder: Encoder,
    source: Source,
    beat: Callable[[], None],
) -> None:
    """Writes what is missing of a writer's part."""
    missing = sum(map(len, writer.pending()))
    if not missing:
        return
    description = writer.description
    print(
        f"computing features of the locked {description.tower} encoder, once, into "
        f"{writer.folder}: {description.told()} for each of {missing} examples",
        flush=True,
    )
    encoder.on_batch = beat
    embed_source(
        encoder, source, writer, config.data,
        output="features", batch_size=_BATCH, stop=lambda step: False,
    )  # fmt: skip
    if writer.rounding:
        print(f"{writer.folder.name}{writer.told_rounding()}", flush=True)


class FeatureCache:
    """Wraps `Encoder.encode` with a cache of locked-encoder features.

    `encoder` may be replaced by one with another head. Nothing is cached unless the settings ask
    for it.
    """

    def __init__(self, encoder: Encoder, sources: Mapping[str, TowerSource]):
        """Reads the cached features; all processes of a job must do so together."""
        self.encoder = encoder
        blueprint = encoder.blueprint
        config = blueprint.config
        self._descriptions: dict[str, EmbeddingDescription] = {}
        self._rows: dict[str, dict[str, np.ndarray]] = {}
        self._new: dict[str, set[str]] = {}
        if not config.data.keep_locked_features:
            return
        for tower in filter(blueprint.features_are_locked, config.towers):
            self._descriptions[tower] = EmbeddingDescription(
                tower=tower,
                shape=(encoder.width(tower, "features"),),
                dtype=config.data.kept_dtype,
                count=0,
                source=_BY_CONTENT,
                weights=weights_name(blueprint, sources, tower, encoder.step),
                preprocessing=preprocessing(config, tower, "features"),
            )
            rows = _read(_place(config, self._descriptions[tower]))
            # Processes that know different inputs would not encode the same batches.
            known = hashlib.sha256("".join(sorted(rows)).encode()).hexdigest()
            alike = set(gather(f"kept/{tower}", known, config.distributed.barrier_timeout))
            self._rows[tower], self._new[tower] = (rows if len(alike) == 1 else {}), set()

    def encode(
        self, tower: str, inputs: Mapping[str, np.ndarray], *, output: str = "embeds"
    ) -> np.ndarray:
        """Returns the same as `Encoder.encode`."""
        if tower not in self._rows or only_features(inputs):
            return self.encoder.encode(tower, inputs, output=output)
        rows, keys = self._rows[tower], [key.hex() for key in row_keys(inputs)]
        if missing := set(keys) - set(rows):
            features = self.encoder.encode(tower, inputs, output="features")
            stored = in_dtype(features, self._descriptions[tower].dtype).astype(np.float32)
            rows.update(zip(keys, stored, strict=True))
            self._new[tower] |= missing
        features = np.stack([rows[key] for key in keys])
        if output == "features":
            return features
        return self.encoder.encode(tower, {"features": features})

    def save(self) -> None:
        """Writes new features to a separate folder, because runs may do so at the same time.

        A failed write is reported and does not end the run.
        """
        with side_output("the cache of the evaluation's features"):
            self._save()

    def _save(self) -> None:
        for tower, new in self._new.items():
            if not new or not is_primary():
                continue
            place = _place(self.encoder.blueprint.config, self._descriptions[tower])
            description = replace(self._descriptions[tower], count=len(new), shard_size=len(new))
            keys = sorted(new)
            writer = EmbeddingWriter(place / uuid.uuid4().hex, description)
            writer.write(range(len(keys)), keys, [self._rows[tower][key] for key in keys])
            new.clear()


def _read(place: Path) -> dict[str, np.ndarray]:
    """Returns the rows of all folders in a place, without incomplete or damaged folders."""
    rows: dict[str, np.ndarray] = {}
    for folder in sorted(place.glob("*")):
        try:
            store = EmbeddingStore(folder)
            keys, found = store.stored(np.arange(len(store)))
        except FileNotFoundError:  # being written, or left by a killed process
            continue
        except ValueError as error:
            _LOG.warning("%s; its features are computed again", error)
            continue
        rows.update(zip(keys, found if found is not None else (), strict=True))
    return rows
