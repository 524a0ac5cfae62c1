"""Features that users computed elsewhere: one `.npz` or safetensors file, one array a modality.

Arrays have the examples on their first axis and any shape behind it (CellCLIP's profiles are
(samples, channels, features)). The names `id`, `ids`, `label`, `labels`, `text` and `captions` mean
what they say; every other array is the embedding of the modality of its name. Labels are integers,
or the names of classes.
"""

import functools
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import NO_CLASSES, Example, Source, fingerprint_of
from cwcl_jax.data.sources.files import require_file
from cwcl_jax.data.sources.texts import clean

_ID, _LABEL, _TEXT = ("id", "ids"), ("label", "labels"), ("text", "captions")


class Arrays(Source):
    """Rows of arrays of equal length."""

    def __init__(self, arrays: Mapping[str, np.ndarray], *, name: str):
        _check(arrays, name)
        self._arrays = dict(arrays)
        self._length = len(next(iter(arrays.values())))
        self._ids = _first(arrays, _ID)
        self._labels = _first(arrays, _LABEL)
        self._class_names: list[str] | None = None
        if self._labels is not None and self._labels.dtype.kind == "U":
            names, self._labels = np.unique(self._labels, return_inverse=True)
            self._class_names = names.tolist()
        self._texts = _first(arrays, _TEXT)
        special = {*_ID, *_LABEL, *_TEXT}
        self.features = {key: array for key, array in arrays.items() if key not in special}
        self.embedded = tuple(self.features)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        lacks = {}
        if self._labels is None:
            lacks["label"] = NO_CLASSES
        if self._texts is None:
            lacks["text"] = f"has no array text or captions (it has {', '.join(self._arrays)})"
        return lacks

    def __len__(self) -> int:
        return self._length

    def read(self, index: int, fields: Collection[str]) -> Example:
        name = str(index) if self._ids is None else str(self._ids[index])
        example: Example = {"id": name}
        if "features" in fields:
            vectors = {m: np.asarray(a[index], np.float32) for m, a in self.features.items()}
            if not all(np.isfinite(vector).all() for vector in vectors.values()):
                raise BadExample("features not finite", name)
            example["features"] = vectors
        if self._labels is not None and "label" in fields:
            example["label"] = int(self._labels[index])
        if self._texts is not None and "text" in fields:
            value = self._texts[index]
            many = isinstance(value, np.ndarray)
            example["text"] = [clean(str(v)) for v in value] if many else clean(str(value))
        return example

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        found = {m: np.asarray(a[indices], np.float32) for m, a in self.features.items()}
        return found if all(np.isfinite(rows).all() for rows in found.values()) else None

    def fingerprint(self) -> str:
        return fingerprint_of("arrays", self._checksums)

    @functools.cached_property
    def _checksums(self) -> list[tuple[object, ...]]:
        """All bytes count, at some 2 GB/s: features that are computed anew keep their shapes."""
        found: list[tuple[object, ...]] = []
        for name, array in sorted(self._arrays.items()):
            data = np.ascontiguousarray(array).view(np.uint8).data
            found.append((name, array.shape, array.dtype.str, zlib.crc32(data)))
        return found


def _first(arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> np.ndarray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _check(arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Raises ValueError, naming the array, where they cannot be rows of examples."""
    for key, array in arrays.items():
        where = f"The array {key!r} of {name} (shape {array.shape}, {array.dtype})"
        if array.ndim == 0:
            raise ValueError(f"{where} has no axis of examples; leave it out of the file.")
        if key in _LABEL and (array.ndim != 1 or array.dtype.kind not in "iubU"):
            raise ValueError(f"{where} must hold one integer, or one class name, an example.")
        if key not in {*_ID, *_LABEL, *_TEXT} and array.dtype.kind in "USMmc":
            raise ValueError(
                f"{where} holds no numbers, so it is no embedding; leave it out of the file, or "
                "call it text or ids if it is one of these."
            )
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The arrays of {name} differ in length: {lengths}.")


def open_arrays(path: str) -> Arrays:
    """Opens `arrays:/features.npz` (or .safetensors)."""
    file = require_file(path, "The file of features")
    if file.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{file} must be .npz or .safetensors.")
    arrays = _load_npz(file) if file.suffix == ".npz" else _load_safetensors(file)
    if not arrays:
        raise ValueError(f"{file} holds no arrays.")
    return Arrays(arrays, name=file.name)


def _load_safetensors(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise _unreadable(file, error) from error


def _load_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        if not zipfile.is_zipfile(file):
            raise zipfile.BadZipFile("it is no whole archive")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file} cannot be read: {error}. Write it again; arrays of Python objects must become "
        "numbers or strings (array.astype(str))."
    )
