"""Features of locked encoders in evaluations, stored by the bytes of the inputs.

Every evaluation of a locked tower encodes the same prompts and test items. With
`data.keep_locked_features` they are encoded once; later evaluations, and those of other runs with
the same encoder, only read their inputs and apply the head.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from cwcl_jax.data.content import KEY_BYTES, row_keys
from cwcl_jax.files import replacing
from cwcl_jax.modalities.features import only_features
from cwcl_jax.training.embedding import preprocessing, weights_name
from cwcl_jax.training.encode import Encoder
from cwcl_jax.training.features import cache_folder
from cwcl_jax.training.state import TowerSource

_LOG = logging.getLogger(__name__)


class KeptRows:
    """Wraps `Encoder.encode` with a cache of locked-encoder features, computed once per input.

    `encoder` may be replaced by one with another head. Nothing is cached if the settings do not ask
    for it, or in a job of several processes, which would have to agree on what each of them still
    has to compute.
    """

    def __init__(self, encoder: Encoder, sources: Mapping[str, TowerSource]):
        self.encoder = encoder
        blueprint = encoder.blueprint
        config = blueprint.config
        self._files: dict[str, Path] = {}
        self._rows: dict[str, dict[bytes, np.ndarray]] = {}
        self._changed: set[str] = set()
        if not config.data.keep_locked_features or jax.process_count() > 1:
            return
        folder = cache_folder(config)
        for modality in config.towers:
            if blueprint.features_are_locked(modality):
                made = preprocessing(config, modality, "features")
                weights = weights_name(blueprint, sources, modality, encoder.step)
                name = hashlib.sha256(json.dumps([made, weights], sort_keys=True).encode())
                file = folder / f"rows-{modality}-{name.hexdigest()[:16]}.npz"
                self._files[modality] = file
                self._rows[modality] = _read(file)

    def encode(
        self, modality: str, inputs: Mapping[str, np.ndarray], *, output: str = "embeds"
    ) -> np.ndarray:
        """Returns the same as `Encoder.encode`."""
        if modality not in self._rows or only_features(inputs):
            return self.encoder.encode(modality, inputs, output=output)
        rows, keys = self._rows[modality], row_keys(inputs)
        if any(key not in rows for key in keys):
            features = self.encoder.encode(modality, inputs, output="features")
            rows.update(zip(keys, features, strict=True))
            self._changed.add(modality)
        features = np.stack([rows[key] for key in keys])
        if output == "features":
            return features
        return self.encoder.encode(modality, {"features": features})

    def save(self) -> None:
        """Writes the new features."""
        for modality in self._changed:
            file, rows = self._files[modality], self._rows[modality]
            file.parent.mkdir(parents=True, exist_ok=True)
            keys = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, KEY_BYTES)
            # Runs that share the cache may save at the same time: the last one's file stays.
            with replacing(file) as partial, partial.open("wb") as handle:
                np.savez(handle, keys=keys, features=np.stack(list(rows.values())))
        self._changed.clear()


def _read(file: Path) -> dict[bytes, np.ndarray]:
    """The rows of a file; none where there is no file, or one that a crash of the machine broke."""
    if not file.exists():
        return {}
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            keys, features = arrays["keys"], arrays["features"]
        return {key.tobytes(): row for key, row in zip(keys, features, strict=True)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        _LOG.warning("%s cannot be read (%s); its features are made again.", file, error)
        return {}
