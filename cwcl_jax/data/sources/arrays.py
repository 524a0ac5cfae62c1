"""Features that users computed elsewhere: one `.npz` or safetensors file, one array a modality.

Arrays have the examples on their first axis and any shape behind it (CellCLIP's profiles are
(samples, channels, features)). The names `id`, `ids`, `label`, `labels`, `text` and `captions` mean
what they say; every other array is the embedding of the modality of its name.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, SourceBase, fingerprint_of
from cwcl_jax.data.sources.files import identity_of, require

_ID, _LABEL, _TEXT = ("id", "ids"), ("label", "labels"), ("text", "captions")


class Arrays(SourceBase):
    """Rows of arrays of equal length."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, name: str, size: int = 0):
        lengths = {key: len(array) for key, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"The arrays of {name} differ in length: {lengths}.")
        self._length = next(iter(lengths.values()))
        self._ids = _first(arrays, _ID)
        self._labels = _first(arrays, _LABEL)
        self._texts = _first(arrays, _TEXT)
        special = {*_ID, *_LABEL, *_TEXT}
        self.features = {key: array for key, array in arrays.items() if key not in special}
        self.embedded = tuple(self.features)
        self._identity = (name, size)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int, fields: Collection[str]) -> Example:
        name = str(index) if self._ids is None else str(self._ids[index])
        example: Example = {"id": name}
        if "embeds" in fields:
            vectors = {m: np.asarray(a[index], np.float32) for m, a in self.features.items()}
            if not all(np.isfinite(vector).all() for vector in vectors.values()):
                raise BadExample("embeds not finite", name)
            example["embeds"] = vectors
        if self._labels is not None and "label" in fields:
            example["label"] = int(self._labels[index])
        if self._texts is not None and "text" in fields:
            value = self._texts[index]
            many = isinstance(value, np.ndarray)
            example["text"] = [str(text) for text in value] if many else str(value)
        return example

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        found = {m: np.asarray(a[indices], np.float32) for m, a in self.features.items()}
        return found if all(np.isfinite(rows).all() for rows in found.values()) else None

    def fingerprint(self) -> str:
        shapes = {key: (array.shape, array.dtype) for key, array in self.features.items()}
        return fingerprint_of("arrays", self._identity, self._length, shapes)


def _first(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def open_arrays(path: str) -> Arrays:
    """Opens `arrays:/features.npz` (or .safetensors)."""
    file = require(path, "The file of features")
    if file.suffix == ".safetensors":
        from safetensors.numpy import load_file

        arrays = load_file(file)
    elif file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    else:
        raise ValueError(f"{file} must be .npz or .safetensors.")
    if not arrays:
        raise ValueError(f"{file} holds no arrays.")
    return Arrays(arrays, name=Path(file).name, size=identity_of(file)[1])
