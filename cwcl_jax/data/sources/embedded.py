"""Precomputed embeddings as a source of their own, or beside the examples they were made from."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, Source, SourceBase, fingerprint_of


class Embedded(SourceBase):
    """A source whose examples carry "embeds"; the modalities of the folders need no raw inputs.

    Refuses folders that were made from another source, by its fingerprint.
    """

    def __init__(self, source: Source, folders: Sequence[str]):
        self.source = source
        self.stores: dict[str, EmbeddingStore] = {}
        for folder in folders:
            store = EmbeddingStore(folder)
            expected = source.fingerprint()
            store.description.require(folder, source=expected, count=len(source))
            self.stores[store.description.modality] = store
        self.embedded = tuple(self.stores)

    @property
    def class_names(self) -> Sequence[str] | None:
        return self.source.class_names

    @property
    def lacks(self) -> Mapping[str, str]:
        return getattr(self.source, "lacks", {})

    @property
    def durations(self) -> np.ndarray | None:
        return getattr(self.source, "durations", None)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, fields: Collection[str]) -> Example:
        example = self.source.read(index, fields)
        if "embeds" in fields:
            example["embeds"] = {}
            for modality, store in self.stores.items():
                name, vector = store[index]
                if name != example["id"]:
                    raise ValueError(
                        f"Embedding {index} in {store.folder} belongs to {name!r}, the source's "
                        f"example is {example['id']!r}: make the embeddings again."
                    )
                if vector is None:
                    raise BadExample("embeds missing", f"{name} was unusable when it was embedded")
                example["embeds"][modality] = vector
        return example

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        ids = [self.source.read(int(index), ())["id"] for index in indices]
        found = {}
        for modality, store in self.stores.items():
            names, rows = store.rows(indices)
            if rows is None or names != ids:
                return None
            found[modality] = rows
        return found

    def fingerprint(self) -> str:
        made = [(m, store.description.to_json()) for m, store in sorted(self.stores.items())]
        return fingerprint_of("embedded", self.source.fingerprint(), made)


class EmbeddingsOnly(SourceBase):
    """The vectors of one folder, without the examples they came from."""

    def __init__(self, store: EmbeddingStore):
        self.store = store
        self.embedded = (store.description.modality,)

    def __len__(self) -> int:
        return len(self.store)

    def read(self, index: int, fields: Collection[str]) -> Example:
        del fields
        name, vector = self.store[index]
        if vector is None:
            raise BadExample("embeds missing", f"{name} was unusable when it was embedded")
        return {"id": name, "embeds": {self.store.description.modality: vector}}

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        _, rows = self.store.rows(indices)
        return None if rows is None else {self.store.description.modality: rows}

    def fingerprint(self) -> str:
        return fingerprint_of("embeddings", self.store.description.to_json())


def open_embeddings(path: str) -> EmbeddingsOnly:
    """Opens `embeddings:/folder`, as `python -m cwcl_jax.embed` writes it."""
    return EmbeddingsOnly(EmbeddingStore(path))
