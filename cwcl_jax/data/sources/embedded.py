"""Precomputed embeddings as a source of their own, or beside the examples they were made from."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import (
    Example,
    Source,
    SourceAround,
    fingerprint_of,
)
from cwcl_jax.data.sources.beside import Beside
from cwcl_jax.data.sources.named import feature_vector


def named_place(text: str) -> tuple[str, str]:
    """Name and path of an entry of `features_from=`, NAME:PATH or PATH alone ("" for its name)."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and name.isidentifier() else ("", text)


def features_beside(text: str, source: Source) -> Source:
    """The source with what `features_from=` names: folders, and files of arrays with their names.

    Args:
      text: PATH or NAME:PATH, several by commas.
    """
    folders, files = [], []
    for entry in text.split(","):
        name, path = named_place(entry)
        path = os.path.expanduser(path)
        if name and (Path(path).is_file() or Path(path).suffix == ".zarr"):
            files.append((name, path))
        else:
            folders.append(f"{name}:{path}" if name else path)
    if folders:  # innermost: they know the fingerprint of the source itself
        source = Embedded(source, folders)
    for name, path in files:
        source = Beside(source, name, path)
    return source


class Embedded(SourceAround):
    """A source whose examples carry "features"; the towers of the folders need no raw inputs.

    Refuses folders that were made from another source, by its fingerprint. NAME:FOLDER gives them
    another name than their tower's.
    """

    def __init__(self, source: Source, folders: Sequence[str]):
        super().__init__(source)
        self._stores: dict[str, EmbeddingStore] = {}
        for text in folders:
            name, folder = named_place(text)
            store = EmbeddingStore(folder)
            expected = source.fingerprint()
            store.description.require(folder, source=expected, count=len(source))
            self._stores[name or store.description.tower] = store

    @property
    def embedded(self) -> Sequence[str]:
        return tuple(dict.fromkeys([*self.source.embedded, *self._stores]))

    @property
    def stores(self) -> Mapping[str, Sequence[EmbeddingStore]]:
        return {**self.source.stores, **{name: [store] for name, store in self._stores.items()}}

    def read(self, index: int, fields: Collection[str]) -> Example:
        example = self.source.read(index, fields)
        if "features" in fields:
            found = dict(example.get("features") or {})
            for name_of_tower, store in self._stores.items():
                name, vectors = store.variants(index)
                if name != example["id"]:
                    raise ValueError(
                        f"Embedding {index} in {store.folder} belongs to {name!r}, the source's "
                        f"example is {example['id']!r}: make the embeddings again."
                    )
                found[name_of_tower] = _add_variants(example, name_of_tower, vectors)
            example["features"] = found
        return example

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        ids = [self.source.read(int(index), ())["id"] for index in indices]
        found = dict(self.source.vectors(indices) or {})
        for tower, store in self._stores.items():
            names, rows = store.rows(indices)
            if rows is None or names != ids:
                return None
            found[tower] = rows
        return found if set(found) >= set(self.embedded) else None

    def fingerprint(self) -> str:
        made = [(m, store.description.fingerprint()) for m, store in sorted(self._stores.items())]
        return fingerprint_of("embedded", self.source.fingerprint(), made)


class EmbeddingsOnly(Source):
    """The vectors of one folder, without the examples they came from."""

    def __init__(self, store: EmbeddingStore):
        self.store = store
        self.embedded = (store.description.tower,)
        self.stores = {store.description.tower: [store]}

    def __len__(self) -> int:
        return len(self.store)

    def read(self, index: int, fields: Collection[str]) -> Example:
        del fields
        name, vectors = self.store.variants(index)
        example: Example = {"id": name}
        tower = self.store.description.tower
        example["features"] = {tower: _add_variants(example, tower, vectors)}
        return example

    def vectors(self, indices: np.ndarray) -> dict[str, np.ndarray] | None:
        _, rows = self.store.rows(indices)
        return None if rows is None else {self.store.description.tower: rows}

    def fingerprint(self) -> str:
        return fingerprint_of("embeddings", self.store.description.fingerprint())


def _add_variants(example: Example, name: str, vectors: np.ndarray) -> np.ndarray:
    """The first vector, evaluation's; the example receives all, where there are several.

    Raises:
      BadExample: there is none, or one of them is not finite or all zero.
    """
    if not len(vectors):
        raise BadExample("features missing", f"{example['id']} was unusable when it was embedded")
    for vector in vectors:
        feature_vector(vector, example["id"])
    if len(vectors) > 1:
        example["variants"] = {**(example.get("variants") or {}), name: vectors}
    return vectors[0]


def open_embeddings(path: str) -> EmbeddingsOnly:
    """Opens `embeddings:/folder`, as `python -m cwcl_jax.embed` writes it."""
    return EmbeddingsOnly(EmbeddingStore(path))
