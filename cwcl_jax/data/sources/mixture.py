"""Several sources as one: concatenated in order, with the share of each in training."""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from cwcl_jax.data.sources.base import Example, Source, fingerprint_of, require_fields


class Mixture(Source):
    """The concatenation of `parts`; `weights` are shares of the examples, None = by length."""

    def __init__(self, parts: Sequence[Source], weights: Sequence[float] | None = None):
        self.parts = list(parts)
        self.weights = None if weights is None else [float(w) for w in weights]
        self.embedded = tuple(sorted(set.intersection(*(set(part.embedded) for part in parts))))
        self.starts = [0, *accumulate(len(part) for part in parts)]

    @property
    def class_names(self) -> Sequence[str] | None:
        names = [part.class_names for part in self.parts]
        same = all(n is not None and list(n) == list(names[0] or ()) for n in names)
        return names[0] if same else None

    @property
    def lacks(self) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for part in self.parts:
            found |= part.lacks
        # Equal numbers mean other classes in another part, so they are not labels of the whole.
        if self.class_names is None and any(part.class_names for part in self.parts):
            found["label"] = "has parts of different classes; data.labels='text' may do"
        return found

    @property
    def durations(self) -> np.ndarray | None:
        found = [part.durations for part in self.parts]
        known = [durations for durations in found if durations is not None]
        return np.concatenate(known) if len(known) == len(found) else None

    @property
    def stores(self) -> Mapping[str, Sequence[Any]]:
        """The caches of those names for which every part has a cache.

        Features of other names have an unknown encoder in some part.
        """
        known = set.intersection(*(set(part.stores) for part in self.parts))
        return {
            name: [store for part in self.parts for store in part.stores[name]] for name in known
        }

    def column(self, name: str) -> np.ndarray:
        """Returns a column as `Source.column`; "part" is the number of each example's part."""
        if name == "part":
            return np.repeat(np.arange(len(self.parts)), np.diff(self.starts))
        if name == "label":
            require_fields(self, (name,), "the mixture")
        found = [part.column(name) for part in self.parts]
        numbers = all(column.dtype.kind in "iufb" for column in found)
        return np.concatenate(found if numbers else [column.astype(object) for column in found])

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, index: int, fields: Collection[str]) -> Example:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part].read(index - self.starts[part], fields)

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        owner = np.searchsorted(self.starts, indices, side="right") - 1
        places, found = [], []
        for part in np.unique(owner):
            places.append(np.flatnonzero(owner == part))
            rows = self.parts[part].vectors(indices[places[-1]] - self.starts[part])
            if rows is None:
                return None
            found.append(rows)
        back = np.argsort(np.concatenate(places))
        return {
            name: np.concatenate([rows[name] for rows in found])[back] for name in self.embedded
        }

    def fingerprint(self) -> str:
        return fingerprint_of("mixture", self.weights, *(part.fingerprint() for part in self.parts))
