"""Precomputed embeddings as a source of their own, or added to the examples they come from."""

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, SameExamples, Source, WrongOrder, fingerprint_of
from cwcl_jax.data.sources.beside import Beside, ColumnBeside
from cwcl_jax.modalities.features import feature_vector
from cwcl_jax.paths import to_path


def named_place(text: str) -> tuple[str, str]:
    """Returns name and path of an entry of `features_from=`, NAME:PATH or PATH alone (name "")."""
    name, colon, path = text.partition(":")
    named = colon and name.isidentifier() and not path.startswith("//")
    return (name, path) if named else ("", text)


def features_beside(text: str, source: Source, cache_dir: str = "") -> Source:
    """Returns the source with the features of `features_from=`: folders, and named files of arrays.

    Args:
      text: PATH or NAME:PATH, several separated by commas.
      cache_dir: for copies of folders on an object store; "" for the user's cache.
    """
    folders, files = [], []
    for entry in text.split(","):
        name, path = named_place(entry)
        path = os.path.expanduser(path)
        if name and (to_path(path).is_file() or to_path(path).suffix == ".zarr"):
            files.append((name, path))
        else:
            folders.append(f"{name}:{path}" if name else path)
    if folders:  # innermost, because they store the fingerprint of the source itself
        source = Embedded(source, folders, cache_dir)
    for name, path in files:
        source = Beside(source, name, path)
    return source


def columns_beside(text: str, source: Source) -> Source:
    """Returns the source with the columns of `columns_from=`, NAME:FILE, separated by commas."""
    for entry in text.split(","):
        name, path = named_place(entry)
        if not name:
            raise ValueError(f"columns_from={entry}: write NAME:FILE, such as speaker:speakers.npy")
        source = ColumnBeside(source, name, os.path.expanduser(path))
    return source


class Embedded(SameExamples):
    """A source whose examples have "features"; the towers of the folders need no raw inputs.

    Folders that were made from another source are refused, by its fingerprint. NAME:FOLDER renames
    the features, whose default name is their tower's.
    """

    def __init__(self, source: Source, folders: Sequence[str], cache_dir: str = ""):
        super().__init__(source)
        self._stores: dict[str, EmbeddingStore] = {}
        for text in folders:
            name, folder = named_place(text)
            store = EmbeddingStore(folder, cache_dir=cache_dir)
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
                    raise WrongOrder(
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
    """Returns the first vector, evaluation's; adds all to the example if there are several.

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


def open_embeddings(path: str, *, cache_dir: str = "") -> EmbeddingsOnly:
    """Opens `embeddings:/folder`, as written by `python -m cwcl_jax.embed`."""
    return EmbeddingsOnly(EmbeddingStore(path, cache_dir=cache_dir))
