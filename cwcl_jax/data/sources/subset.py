"""Some examples of a source, renumbered from zero."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cwcl_jax.data.sources.base import Example, Source, SourceAround, fingerprint_of


class Subset(SourceAround):
    """The examples of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        super().__init__(source)
        self.indices = indices

    @property
    def durations(self) -> np.ndarray | None:
        whole = self.source.durations
        return None if whole is None else whole[np.asarray(self.indices, np.int64)]

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)[np.asarray(self.indices, np.int64)]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, fields: Collection[str]) -> Example:
        return self.source.read(int(self.indices[index]), fields)

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        return self.source.vectors(np.asarray(self.indices, np.int64)[indices])

    def fingerprint(self) -> str:
        # A range prints its bounds; other sequences must print in full.
        indices = self.indices if isinstance(self.indices, range) else list(self.indices)
        return fingerprint_of("subset", self.source.fingerprint(), indices)
