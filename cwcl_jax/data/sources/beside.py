"""Features and columns from a file of arrays next to the examples.

`features_from=NAME:FILE` adds features, `columns_from=NAME:FILE` a column: one value per example.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from cwcl_jax.data.sources.array_files import load_arrays, summaries, take_rows
from cwcl_jax.data.sources.base import Example, SameExamples, Source, WrongOrder, fingerprint_of
from cwcl_jax.modalities.features import feature_vector, usable_rows
from cwcl_jax.paths import to_path

_IDS = ("id", "ids")


class Beside(SameExamples):
    """A source whose examples also have features NAME: row i of a file belongs to example i.

    Args:
      source: the examples.
      name: name of the features.
      file: a file as for `arrays:`, with one array, or with one called NAME. If it also has an
          array id or ids, these must be the examples' ids.
    """

    def __init__(self, source: Source, name: str, file: str):
        super().__init__(source)
        self._name, self._file = name, file
        arrays = load_arrays(to_path(file))
        self._ids = next((arrays[key] for key in _IDS if key in arrays), None)
        rest = [key for key in arrays if key not in _IDS]
        if name not in rest and len(rest) != 1:
            raise ValueError(
                f"features_from={name}:{file} has the arrays {', '.join(arrays)}, none of which is "
                f"called {name!r}; call it so, or keep it in a file of its own."
            )
        self._rows = arrays[name if name in rest else rest[0]]
        shape, kind = self._rows.shape, self._rows.dtype.kind
        if len(shape) < 2 or kind not in "biuf":
            raise ValueError(
                f"features_from={name}:{file} holds {self._rows.dtype} of shape {tuple(shape)}; "
                "features are numbers of shape (examples, width)."
            )
        for what, length in (("rows", shape[0]), ("ids", shape[0] if self._ids is None
                                                  else len(self._ids))):  # fmt: skip
            if length != len(source):
                raise ValueError(
                    f"features_from={name}:{file} has {length} {what}, the source {len(source)} "
                    "examples: row i must belong to example i."
                )

    def __reduce__(self):
        return Beside, (self.source, self._name, self._file)

    @property
    def embedded(self) -> Sequence[str]:
        return tuple(dict.fromkeys([*self.source.embedded, self._name]))

    def read(self, index: int, fields: Collection[str]) -> Example:
        example = self.source.read(index, fields)
        if "features" in fields:
            name = str(example["id"])
            self._check_id(index, name)
            vector = feature_vector(np.array(self._rows[index]), f"{name}, features {self._name!r}")
            example["features"] = {**(example.get("features") or {}), self._name: vector}
        return example

    def _check_id(self, index: int, name: str) -> None:
        if self._ids is None:
            return
        known = self._ids[index]
        known = known.decode("utf-8", "replace") if isinstance(known, bytes) else str(known)
        if known != name:
            raise WrongOrder(
                f"Row {index} of {self._file} belongs to {known!r}, the source's example is "
                f"{name!r}: write the rows in the source's order."
            )

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        found: dict[str, Any] = dict(self.source.vectors(indices) or {})
        if not set(found) >= set(self.source.embedded):
            return None
        if self._ids is not None:
            for index in indices:
                self._check_id(int(index), str(self.source.read(int(index), ())["id"]))
        rows = np.asarray(take_rows(self._rows, indices), np.float32)
        return {**found, self._name: rows} if usable_rows(rows) else None

    def fingerprint(self) -> str:
        return fingerprint_of("beside", self.source.fingerprint(), self._name, self._summary)

    @functools.cached_property
    def _summary(self) -> list[tuple[object, ...]]:
        return summaries({self._name: self._rows})


class ColumnBeside(SameExamples):
    """A source whose column NAME comes from a file: entry i belongs to example i.

    Args:
      source: the examples.
      name: name of the column.
      file: a file as for `arrays:`, with one array, or with one called NAME.
    """

    def __init__(self, source: Source, name: str, file: str):
        super().__init__(source)
        if name in source.column_names:
            raise ValueError(
                f"columns_from={name}:{file}: the examples have a column {name!r} already; give "
                "the other one another name."
            )
        self._name, self._file = name, file
        self.column_names = (*source.column_names, name)
        arrays = load_arrays(to_path(file))
        if name not in arrays and len(arrays) != 1:
            raise ValueError(
                f"columns_from={name}:{file} has the arrays {', '.join(arrays)}, none of which is "
                f"called {name!r}; call it so, or keep it in a file of its own."
            )
        self._values = arrays[name if name in arrays else next(iter(arrays))]
        if tuple(self._values.shape) != (len(source),):
            raise ValueError(
                f"columns_from={name}:{file} holds an array of shape {tuple(self._values.shape)}, "
                f"the source {len(source)} examples: entry i must belong to example i."
            )

    def __reduce__(self):
        return ColumnBeside, (self.source, self._name, self._file)

    def column(self, name: str) -> np.ndarray:
        return values_of(self._values) if name == self._name else self.source.column(name)

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        return self.source.vectors(indices)

    def fingerprint(self) -> str:
        # Whatever uses the column includes its values in its own fingerprint.
        return self.source.fingerprint()


def values_of(array: Any) -> np.ndarray:
    """Returns an opened array as a column: numbers unchanged, strings as objects."""
    values = np.asarray(array)
    if values.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "replace")
    return values.astype(object) if values.dtype.kind == "U" else values
