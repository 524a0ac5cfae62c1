"""Users' arrays: raw inputs of any rank and features computed elsewhere, one row per example.

`arrays:FILE?raw=eeg&features=image` provides `eeg` as a raw input of that name, in its own dtype,
and `image` as features of the modality image. Without these options, every array of rows other than
ids, labels, captions and class names provides features of the modality of its name; an array of one
number per example is not used. Arrays have the examples on their first axis, followed by any shape
(CellCLIP's profiles are (samples, channels, features)).
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.array_files import load_arrays, summaries, take_rows
from cwcl_jax.data.sources.base import (
    ALL_FIELDS,
    NO_CLASSES,
    OF_FLOATS,
    Example,
    Source,
    fingerprint_of,
)
from cwcl_jax.data.sources.beside import values_of
from cwcl_jax.data.sources.named import (
    label_of,
    parse_names,
    raw_value,
)
from cwcl_jax.data.sources.texts import clean
from cwcl_jax.modalities.features import feature_vector, usable_rows
from cwcl_jax.paths import to_path

# Default names of these arrays.
_USUAL = {
    "id": ("id", "ids"),
    "label": ("label", "labels"),
    "labels": (),
    "text": ("text", "captions"),
    "classes": ("class_names",),
}


class Arrays(Source):
    """Rows of arrays of equal length.

    Args:
      arrays: name -> array; unnamed ones are ignored if others are named.
      name: name of the file in error messages.
      raw, features: field or modality -> array. Without both, all remaining arrays are features,
          except those of one number per example.
      given: "id", "label", "labels" (sets), "text" or "classes" -> array, if its name is not the
          default.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        *,
        name: str,
        raw: Mapping[str, str] | None = None,
        features: Mapping[str, str] | None = None,
        given: Mapping[str, str] | None = None,
    ):
        self._arrays, self.column_names = arrays, tuple(arrays)
        raw, features = dict(raw or {}), dict(features or {})
        roles = _roles(arrays, given or {}, {*raw.values(), *features.values()}, name)
        for option, named in (("raw", raw), ("features", features)):
            for key, array in named.items():
                _require(arrays, array, f"{option}={key}:{array}", name)
                found = arrays[array]
                if option == "features" and found.ndim == 1 and found.dtype.kind in "biuf":
                    raise ValueError(
                        f"The array {array!r} of {name} has one number per example, which is no "
                        f"vector of features ({option}={key}); reshape it to (examples, 1), or "
                        "leave it out."
                    )
        if not raw and not features:
            free = {key: array for key, array in arrays.items() if key not in roles.values()}
            features = {key: key for key, array in free.items() if not _is_column(array, free)}
        self.raw = {key: arrays[array] for key, array in raw.items()}
        self.features = {key: arrays[array] for key, array in features.items()}
        special = {role: np.asarray(arrays[key]) for role, key in roles.items()}
        self._class_names = _names(special.pop("classes", None))
        # What line and file specify in addition to the rows; empty if all names are defaults.
        renamed = {key: array for key, array in features.items() if key != array}
        self._said = [part for part in (raw, renamed, self._class_names) if part]
        rows = {roles[role]: array for role, array in special.items()}
        rows |= {array: arrays[array] for array in [*raw.values(), *features.values()]}
        _check(rows, name, {roles[role]: role for role in special})
        self._rows = rows
        self._length = next(iter(rows.values())).shape[0]
        self._ids, self._texts = special.get("id"), special.get("text")
        self._labels, self._sets = special.get("label"), special.get("labels")
        if self._labels is not None and self._labels.dtype.kind in "US":
            self._class_names, self._labels = _numbered(self._labels, self._class_names, name)
        self._unnamed = [key for key in arrays if key not in rows and key not in roles.values()]
        self._known = ", ".join(arrays)
        self.embedded = tuple(self.features)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        lacks = {
            key: f"has an array {key!r} that the line does not use; add raw={key} or features={key}"
            for key in self._unnamed
            if key not in self.raw
        }
        for field in ("image", "audio"):
            if field not in self.raw:
                lacks.setdefault(
                    field, f"has no {field} as raw input (it has {self._known}); name it with raw="
                )
        if self._labels is None:
            lacks["label"] = NO_CLASSES
        if self._texts is None:
            lacks["text"] = f"has no array text or captions (it has {self._known})"
        return lacks

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"The arrays have {len(self)} rows; asked for {index}")
        return self.read(index, (*ALL_FIELDS, *self.raw))

    def read(self, index: int, fields: Collection[str]) -> Example:
        name = str(index) if self._ids is None else _as_text(self._ids[index])
        example: Example = {"id": name}
        for key, array in self.raw.items():
            if key in fields:
                example[key] = raw_value(key, _row(array, index, name), name)
        if "features" in fields and self.features:
            example["features"] = {
                modality: feature_vector(_row(array, index, name), f"{name}, features {modality!r}")
                for modality, array in self.features.items()
            }
        if self._labels is not None and "label" in fields:
            example["label"] = label_of(self._labels[index], self._class_names, name)
        if self._sets is not None and "labels" in fields:
            row = np.atleast_1d(self._sets[index])
            example["labels"] = row[row >= 0] if row.dtype.kind in "iu" else row
        if self._texts is not None and "text" in fields:
            value = self._texts[index]
            many = isinstance(value, np.ndarray)
            texts = [clean(_as_text(v)) for v in value] if many else clean(_as_text(value))
            example["text"] = texts
        return example

    def column(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            return super().column(name)
        values = values_of(self._arrays[name])
        if values.shape != (len(self),):
            raise ValueError(
                f"the array {name!r} has shape {values.shape}; a column has one value per example"
            )
        return values

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        found = {
            modality: np.asarray(take_rows(array, indices), np.float32)
            for modality, array in self.features.items()
        }
        return found if all(map(usable_rows, found.values())) else None

    def fingerprint(self) -> str:
        return fingerprint_of("arrays", self._summaries, *self._said)

    @functools.cached_property
    def _summaries(self) -> list[tuple[object, ...]]:
        """Name, shape, dtype and checksum of each array.

        Bytes are read, at about 2 GB/s, because recomputed features keep their shapes.
        """
        return summaries(self._rows)


class OpenedArrays(Arrays):
    """Arrays of a file; when pickled, it stores the line and not the values."""

    def __init__(self, path: str, options: Mapping[str, str]):
        self._line = (path, dict(options))
        given = {role: array for role in _USUAL if (array := options[role])}
        raw, features = parse_names(options["raw"], options["features"])
        arrays = load_arrays(to_path(path))
        if Path(path).suffix == ".npy" and len({*raw, *features}) == 1:
            # A .npy file has one array, whose name may be any.
            (array,) = arrays.values()
            arrays = {next(iter({**raw, **features}.values())): array}
        super().__init__(arrays, name=Path(path).name, raw=raw, features=features, given=given)

    def __reduce__(self):
        return OpenedArrays, self._line


def open_arrays(
    path: str,
    *,
    raw: str = "",
    features: str = "",
    id: str = "",
    label: str = "",
    labels: str = "",
    text: str = "",
    classes: str = "",
) -> Arrays:
    """Opens `arrays:FILE`: .npz, .npy, a folder of .npy, .safetensors, HDF5 or .zarr.

    Args:
      raw: raw inputs, `eeg` or `eeg:ARRAY`, several separated by commas.
      features: features of modalities, named in the same way.
      labels: array of sets of labels: (n, k) integers padded with -1, or (n,) or (n, k) strings.
      id, label, text, classes: arrays of ids, labels (integers or names), captions, and the names
          of integer labels; by default those of these names (or ids, labels, captions,
          class_names).
    """
    options = {"raw": raw, "features": features, "id": id, "label": label, "labels": labels}
    return OpenedArrays(path, {**options, "text": text, "classes": classes})


def _roles(
    arrays: Mapping[str, Any], given: Mapping[str, str], used: Collection[str], name: str
) -> dict[str, str]:
    """Returns role -> array. Arrays of numbers named "text" are not captions."""
    roles = {}
    for role, usual in _USUAL.items():
        if role in given:
            roles[role] = _require(arrays, given[role], f"{role}=", name)
            continue
        free = [key for key in usual if key in arrays and key not in used]
        if role == "text":
            free = [key for key in free if arrays[key].dtype.kind in "USO"]
        if free:
            roles[role] = free[0]
    return roles


def _is_column(array: Any, others: Mapping[str, Any]) -> bool:
    """Returns whether an array has one number, such as a fold, for each row of another array."""
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        return False
    return any(other.ndim > 1 and len(other) == len(array) for other in others.values())


def _require(arrays: Mapping[str, Any], array: str, option: str, name: str) -> str:
    if array not in arrays:
        raise ValueError(f"{name} has no array {array!r} ({option}); it has {', '.join(arrays)}.")
    return array


def _check(arrays: Mapping[str, Any], name: str, roles: Mapping[str, str]) -> None:
    """Raises ValueError, naming the array, if the arrays cannot be rows of examples."""
    if not arrays:
        raise ValueError(f"{name} has no rows: name arrays with raw= or features=.")
    for key, array in arrays.items():
        where = f"The array {key!r} of {name} (shape {array.shape}, {array.dtype})"
        role, kind = roles.get(key), array.dtype.kind
        if array.ndim == 0:
            raise ValueError(f"{where} has no axis of examples; leave it out of the file.")
        floats = OF_FLOATS if kind == "f" else ""
        if role == "label" and (array.ndim != 1 or kind not in "iubUSO"):
            raise ValueError(
                f"{where} must hold one integer or one class name per example.{floats}"
            )
        if role == "labels" and (array.ndim not in (1, 2) or kind not in "iuUSO"):
            raise ValueError(
                f"{where} must hold integers or strings, one or a row per example.{floats}"
            )
        if role == "id" and (array.ndim != 1 or kind not in "iuUSO"):
            raise ValueError(
                f"{where} must hold one integer or string per example; floats lose the last "
                "digits of large ids."
            )
        if role is None and (kind not in "biufV" or array.dtype.type is np.void):
            raise ValueError(
                f"{where} holds no numbers, so it is neither raw input nor features; leave it out "
                "of the file, call it text or ids if it is one of these, or name the others with "
                "raw= and features=."
            )
    lengths = {key: array.shape[0] for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"The arrays of {name} differ in length: {lengths}.")


def _names(array: np.ndarray | None) -> list[str] | None:
    return None if array is None else [_as_text(name) for name in array]


def _numbered(
    labels: np.ndarray, known: list[str] | None, name: str
) -> tuple[list[str], np.ndarray]:
    """Returns class names and labels as integers: positions in `known`, or in sorted order."""
    names, numbers = np.unique([_as_text(label) for label in labels], return_inverse=True)
    if known is None:
        return names.tolist(), numbers
    missing = sorted(set(names.tolist()) - set(known))
    if missing:
        raise ValueError(f"{name}: the label {missing[0]!r} is not one of its class names.")
    return known, np.array([known.index(label) for label in names.tolist()])[numbers]


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _row(array: Any, index: int, name: str) -> np.ndarray:
    """Returns a copy of a row, which the caller may change."""
    try:
        return np.array(array[index])
    except (OSError, RuntimeError) as error:
        raise BadExample("array unreadable", f"{name}: {error}") from error
