"""Rows of Arrow columns as examples, shared by Parquet files and saved data sets."""

import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.types as pat

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.arrow_columns import Columns, plain_type, split_path
from cwcl_jax.data.sources.base import ALL_FIELDS, Example, Source, as_column, fingerprint_of
from cwcl_jax.data.sources.files import read_bytes
from cwcl_jax.data.sources.named import label_of, raw_value
from cwcl_jax.data.sources.texts import captions_of
from cwcl_jax.modalities.features import feature_vector, usable_rows

# pyarrow creates these functions at import, so type checkers do not see them.
_COMPUTE: Any = pyarrow.compute
# Features of up to this many bytes are kept in memory, where reading many rows is cheap.
_MATRIX_BYTES = 1 << 30


@runtime_checkable
class RowStore(Protocol):
    """Files of rows with random access, safe for several threads."""

    def __len__(self) -> int: ...

    def cells(self, index: int, tops: Sequence[str]) -> Mapping[str, pa.Scalar]:
        """Returns the values of one row; raises BadExample if they cannot be read."""
        ...

    def name_of(self, index: int) -> str:
        """Returns file and row as text."""
        ...

    def column(self, top: str) -> Iterator[pa.Array]:
        """Yields a whole column, part by part."""
        ...

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Returns the positions of rows in the columns, which may have another order."""
        ...

    def content(self) -> object:
        """Returns a value that changes when the files change."""
        ...


class ArrowRows(Source):
    """Examples of a store; only relative paths below `root` are accepted."""

    def __init__(self, store: RowStore, columns: Columns, root: Path):
        self._store = store
        self.columns = columns
        self.root = root
        self.embedded = tuple(columns.features)
        self._lock = threading.Lock()
        self._matrices: dict[str, np.ndarray] | None = None

    def __reduce__(self):
        return ArrowRows, (self._store, self.columns, self.root)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self._classes

    @property
    def taken(self) -> Mapping[str, str]:
        columns = self.columns
        several = {"text": columns.text, "labels": columns.labels}
        joined = {name: " and ".join(paths) for name, paths in several.items() if paths}
        return {**columns.fields, **joined, **columns.raw, **columns.features}

    @property
    def lacks(self) -> Mapping[str, str]:
        return self.columns.lacks

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"The source has {len(self)} examples; asked for {index}")
        return self.read(index, (*ALL_FIELDS, *self.columns.raw))

    def read(self, index: int, fields: Collection[str]) -> Example:
        columns = self.columns
        tops = columns.tops(fields)
        cells = self._store.cells(index, tops) if tops else {}
        key = _value(cells, columns.fields["id"]) if "id" in columns.fields else None
        name = self._store.name_of(index) if key is None else str(key)
        example: Example = {"id": name}
        for field in ("image", "audio"):
            if field in fields and field in columns.fields:
                data = self._media(_value(cells, columns.fields[field]), name)
                example |= {} if data is None else {field: data}
        if "text" in fields and columns.text:
            example |= _captions([_value(cells, path) for path in columns.text])
        if "label" in fields and "label" in columns.fields:
            example |= self._label(_value(cells, columns.fields["label"]), name)
        if "labels" in fields and columns.labels:
            example["labels"] = [_value(cells, path) for path in columns.labels]
        for key, path in columns.raw.items():
            if key in fields:
                example[key] = raw_value(key, _numbers(cells, path, key, name), name)
        if "features" in fields and columns.features:
            example["features"] = self._features(cells, name)
        return example

    def _features(self, cells: Mapping[str, pa.Scalar], name: str) -> dict[str, np.ndarray]:
        found = {}
        for modality, path in self.columns.features.items():
            vector = feature_vector(_numbers(cells, path, "features", name), name)
            expected = self._shapes.get(modality)
            if expected is not None and vector.shape != expected:
                raise BadExample(
                    "features of another shape", f"{name}: {vector.shape}, others {expected}"
                )
            found[modality] = vector
        return found

    @functools.cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of the first usable row of each modality, which all rows must have."""
        found: dict[str, tuple[int, ...]] = {}
        tops = self.columns.tops(("features",))
        for index in range(min(len(self), 100)):
            for modality, path in self.columns.features.items():
                try:
                    cells = self._store.cells(index, tops)
                    found.setdefault(modality, _numbers(cells, path, "features", "").shape)
                except BadExample:
                    continue
            if len(found) == len(self.columns.features):
                break
        return found

    def column(self, name: str) -> np.ndarray:
        top, *members = split_path(name)
        try:
            parts = [_members(part, members) for part in self._store.column(top)]
        except (KeyError, pa.ArrowException):
            return super().column(name)
        if not all(_is_scalar(part.type) for part in parts):
            raise ValueError(f"the column {name!r} holds {parts[0].type}, neither text nor numbers")
        places = self._store.places(np.arange(len(self)))
        return np.concatenate([_column_values(part) for part in parts])[places]

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        with self._lock:
            if self._matrices is None:
                self._matrices = _matrices(self._store, self.columns.features)
        if not self._matrices:
            return None
        places = self._store.places(indices)
        found = {modality: matrix[places] for modality, matrix in self._matrices.items()}
        return found if all(map(usable_rows, found.values())) else None

    def fingerprint(self) -> str:
        return fingerprint_of("arrow", self.columns.said(), len(self), self._store.content())

    def _media(self, value: Any, name: str) -> bytes | None:
        """Returns the encoded bytes of a cell: bytes, a path, or both (then the bytes are used).

        Raises:
          BadExample: the path is outside the root, or its file is unreadable.
        """
        if isinstance(value, dict):
            data = value.get("bytes")
            value = value.get("path") if data is None else data
        if not isinstance(value, str):
            return value
        root = self.root.resolve()
        try:
            file = (root / value).resolve()
        except (OSError, ValueError) as error:
            raise BadExample("file unreadable", f"{name}: {value!r}: {error}") from error
        if not file.is_relative_to(root):
            raise BadExample(
                "file outside of the folder",
                f"{name}: {value!r} is not below {root}; root=FOLDER names another one",
            )
        return read_bytes(file)

    def _label(self, value: Any, name: str) -> dict[str, int]:
        if value is None or (isinstance(value, str) and not value.strip()):
            return {}
        if isinstance(value, str) and self._classes is not None:
            return {"label": self._places[value.strip()]}
        return {"label": label_of(value, self._classes, name)}

    @functools.cached_property
    def _classes(self) -> list[str] | None:
        """Stored names, or the sorted strings of a column; None if labels are numbers."""
        path, stored = self.columns.fields.get("label"), self.columns.class_names
        if stored is not None or path is None:
            return None if stored is None else list(stored)
        top, *members = split_path(path)
        known: set[str] = set()
        for part in self._store.column(top):
            part = _members(part, members)
            kind = plain_type(part.type)
            if pat.is_integer(kind) or pat.is_boolean(kind):
                return None
            known |= {value.strip() for value in part.unique().to_pylist() if value is not None}
        known.discard("")
        return None if all(map(str.isdecimal, known)) else sorted(known)

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._classes or ())}


def _members(part: Any, members: Sequence[str]) -> pa.Array:
    for member in members:
        part = _COMPUTE.struct_field(part, member)
    return part


def _is_scalar(kind: pa.DataType) -> bool:
    kind = kind.value_type if pat.is_dictionary(kind) else kind
    return not (pat.is_nested(kind) or isinstance(kind, pa.BaseExtensionType))


def _column_values(part: Any) -> np.ndarray:
    """Returns integers without gaps unchanged, everything else as objects."""
    if pat.is_integer(part.type) and not part.null_count:
        return part.to_numpy(zero_copy_only=False)
    return as_column(part.to_pylist())


def _value(cells: Mapping[str, pa.Scalar], path: str) -> Any:
    """Returns a cell as a Python value; for a list of structs, the list of their members."""
    top, *members = split_path(path)
    value = cells[top].as_py()
    for member in members:
        if isinstance(value, list):
            value = [None if item is None else item.get(member) for item in value]
        else:
            value = None if value is None else value.get(member)
    return value


def _captions(values: Sequence[Any]) -> dict[str, Any]:
    found = [captions for value in values if (captions := captions_of(value)) is not None]
    if not found:
        return {}
    if len(values) == 1:
        return {"text": found[0]}
    return {"text": [text for item in found for text in _listed(item)]}


def _listed(captions: str | list[str]) -> list[str]:
    return [captions] if isinstance(captions, str) else captions


def _numbers(cells: Mapping[str, pa.Scalar], path: str, field: str, name: str) -> np.ndarray:
    """Returns the array of a cell of numbers, or of lists of numbers of equal lengths.

    Raises:
      BadExample: there is no value, or its lists differ in length.
    """
    top, *members = split_path(path)
    scalar: Any = cells[top]
    for member in members:
        if isinstance(scalar, pa.ListScalar) and scalar.is_valid:
            return _flattened(_COMPUTE.struct_field(scalar.values, member), field, name)
        scalar = scalar[member] if scalar.is_valid else scalar
    if isinstance(scalar, pa.FixedShapeTensorScalar) and scalar.is_valid:
        return np.array(scalar.to_numpy())
    while isinstance(scalar, pa.ExtensionScalar):
        scalar = scalar.value
    if scalar is None or not scalar.is_valid:
        raise BadExample(f"{field} missing", name)
    if isinstance(scalar, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)):
        return _flattened(scalar.values, field, name)
    return np.asarray(scalar.as_py(), scalar.type.to_pandas_dtype())


def _stacked(part: Any) -> np.ndarray:
    """Returns all rows of a part of a column as one array."""
    if isinstance(part, pa.FixedShapeTensorArray) and not part.null_count:
        return part.to_numpy_ndarray()
    while isinstance(part, pa.ExtensionArray):
        part = part.storage
    return _flattened(part, "features", "")


def _matrices(store: RowStore, features: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Returns whole columns as float32; {} if rows differ in shape, or need too much memory."""
    found = {}
    room = _MATRIX_BYTES // max(1, len(features) * len(store))
    for modality, path in features.items():
        parts = []
        top, *members = split_path(path)
        try:
            for part in store.column(top):
                parts.append(np.asarray(_stacked(_members(part, members)), np.float32))
                if parts[-1].nbytes > room * len(part):
                    return {}
        except (BadExample, ValueError, TypeError, pa.ArrowException):
            return {}
        if len({part.shape[1:] for part in parts}) != 1:
            return {}
        found[modality] = np.concatenate(parts)
    return found


def _flattened(values: pa.Array, field: str, name: str) -> np.ndarray:
    shape = [len(values)]
    while isinstance(values, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray)):
        lengths = _COMPUTE.list_value_length(values).unique()
        if values.null_count or len(lengths) > 1:
            raise BadExample(f"{field} ragged", f"{name}: its lists differ in length")
        shape.append(lengths[0].as_py() if len(lengths) else 0)
        values = values.flatten()
    if values.null_count:
        raise BadExample(f"{field} not finite", f"{name}: it has nulls")
    # A copy, so that callers cannot change the file's memory.
    return np.array(values.to_numpy(zero_copy_only=False)).reshape(shape)
