"""Some examples of a source, under their own numbers from zero."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cwcl_jax.data.sources.base import Example, Source, SourceBase, fingerprint_of


class Subset(SourceBase):
    """The examples of `source` at `indices`, in that order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source = source
        self.indices = indices
        self.embedded = tuple(getattr(source, "embedded", ()))

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        return getattr(self.source, "lacks", {})

    @property
    def durations(self) -> np.ndarray | None:
        whole = getattr(self.source, "durations", None)
        return None if whole is None else whole[np.asarray(self.indices, np.int64)]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int, fields: Collection[str]) -> Example:
        return self.source.read(int(self.indices[index]), fields)

    def fingerprint(self) -> str:
        # A range prints as its bounds; other sequences must print whole.
        indices = self.indices if isinstance(self.indices, range) else list(self.indices)
        return fingerprint_of("subset", self.source.fingerprint(), indices)
