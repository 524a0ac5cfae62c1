"""Stored embeddings of a whole source: array_record files and a description, read at random.

A folder holds `description.json` and one file for every `shard_size` examples, in the source's
order. The description states what the vectors depend on (weights, preprocessing, source); a folder
that was made from anything else is refused. Files are distributed over hosts and appear only when
complete, so an interrupted run continues with the missing ones. An example has one vector, or
several from which training draws (`data.views`); evaluation uses the first.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Int64

from cwcl_jax.copies import local_copy
from cwcl_jax.files import parse_json, replacing
from cwcl_jax.paths import to_path

_VERSION = 1
_DESCRIPTION = "description.json"
# Differing fields that a message tells.
_TOLD = 4
# Fields that hold hashes, which name nothing.
_HASHES = {
    "source": " (a hash of the examples and their order)",
    "weights": " (a hash of the tower's files, or of a run's settings, and its step)",
}
_AGAIN = "delete the folder and make the embeddings again"
DTYPES: dict[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}


@dataclass(frozen=True)
class EmbeddingDescription:
    """What a folder of embeddings holds and what it was made from.

    Attributes:
      tower: the tower that computed the vectors.
      shape: shape of one vector, usually (dim,).
      dtype: "float16", "bfloat16" or "float32"; readers return float32.
      count: number of examples of the source.
      source: fingerprint of the source.
      weights: hash of the tower's weights.
      preprocessing: everything else that determines the vectors (sizes, tokenizer, pooling, ...).
      shard_size: examples in one file.
      draws: determines which inputs of an example have vectors, see `data.views.kept_draws`; {}
        for evaluation's input only.
    """

    tower: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    source: str
    weights: str
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    shard_size: int = 8192
    draws: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} of embeddings must be one of {list(DTYPES)}.")

    def to_json(self) -> str:
        values = asdict(self)
        # The key that the first version wrote, so that older folders and fingerprints stay valid.
        values["modality"] = values.pop("tower")
        if not self.draws:  # the first version did not write it
            del values["draws"]
        return json.dumps({"version": _VERSION, **values}, indent=1, sort_keys=True)

    def told(self) -> str:
        """Returns what an example has, as text for users."""
        views = self.draws.get("views", {}).get("views")
        several = f"{views} vectors" if views else "a vector for each caption"
        return f"{several if self.draws else 'a vector'} of {self.shape[0]} {self.dtype}"

    def fingerprint(self) -> str:
        """Returns the text by which the folder enters a source's fingerprint.

        A folder with a vector for each caption of the examples counts the same as one with a single
        vector, because the captions are already part of the source.
        """
        known = self.draws == {"variants": "all"}
        return (replace(self, draws={}) if known else self).to_json()

    @classmethod
    def read(cls, folder: str | Path) -> "EmbeddingDescription":
        """Returns the description of a folder."""
        file = to_path(folder) / _DESCRIPTION
        if not file.exists():
            if not to_path(folder).exists():
                what = "there is no such file or folder"
            else:
                what = f"{_DESCRIPTION} is missing"
            raise FileNotFoundError(
                f"{folder} holds no embeddings ({what}); make them with python -m cwcl_jax.embed."
            )
        try:
            values = parse_json(file.read_bytes())
            if values.pop("version", None) == _VERSION:
                tower = values.pop("modality")
                return cls(**{**values, "tower": tower, "shape": tuple(values["shape"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}); {_AGAIN}.") from error
        raise ValueError(f"{file} was written by another version; make the embeddings again.")

    def require(self, folder: str | Path, **expected: Any) -> None:
        """Raises ValueError if fields of this description are not as expected, and tells which."""
        actual = {"draws": {}} | json.loads(self.to_json())
        wanted = json.loads(json.dumps(expected))
        found = [x for name in wanted for x in _differences(actual[name], wanted[name], name)]
        if found:
            more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
            raise ValueError(
                f"The embeddings in {folder} are stale: {'; '.join(found[:_TOLD])}{more}. Make "
                "them again in another folder, or delete this one."
            )

    @property
    def shards(self) -> int:
        return max(1, -(-self.count // self.shard_size))

    def shard_path(self, folder: str | Path, shard: int) -> Path:
        return to_path(folder) / f"vectors-{shard:05d}-of-{self.shards:05d}.array_record"

    def rows(self, shard: int) -> range:
        """Returns the rows of the examples whose vectors a file holds."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))


def _differences(there: Any, here: Any, name: str) -> Iterator[str]:
    """Yields name and both values of each field in which two values differ, in a mapping by path.

    What is a hash is said to be one.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}")
    elif there != here:
        yield f"{name}{_HASHES.get(name, '')} is {there!r} there and {here!r} here"


class EmbeddingWriter:
    """Writes one host's files: `for rows in writer.pending(): writer.write(rows, ...)`.

    Attributes:
      rounding: the largest |x - stored x| / |x| of the vectors written.
    """

    def __init__(
        self,
        folder: str | Path,
        description: EmbeddingDescription,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.folder = to_path(folder)
        self.description = description
        self.rounding = 0.0
        self._mine = range(process_index, description.shards, process_count)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / _DESCRIPTION
        if file.exists():
            there = EmbeddingDescription.read(folder)
            there.require(folder, **{"draws": {}} | json.loads(description.to_json()))
        else:
            with replacing(file) as partial:
                partial.write_text(description.to_json())

    def pending(self) -> list[range]:
        """Returns the rows of this host's files that do not exist yet."""
        paths = {s: self.description.shard_path(self.folder, s) for s in self._mine}
        return [self.description.rows(s) for s, path in paths.items() if not path.exists()]

    def write(
        self, rows: range, ids: Sequence[str], vectors: Sequence[np.ndarray] | np.ndarray
    ) -> None:
        """Writes the file of `rows`: one vector of each example, (*shape), or several, (n, *shape).

        An example without any (n = 0) keeps its id.

        Raises:
          ValueError: the shapes are not the description's, or numbers are too large for its dtype.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        if not len(rows) == len(ids) == len(vectors):
            raise ValueError(f"{len(ids)} ids and {len(vectors)} vectors for {len(rows)} rows.")
        shape = self.description.shape
        several = [np.asarray(v)[None] if np.ndim(v) == len(shape) else v for v in vectors]
        if wrong := [v.shape[1:] for v in several if v.shape[1:] != shape]:
            raise ValueError(f"Vectors have shape {wrong[0]}, but the description says {shape}.")
        path = self.description.shard_path(self.folder, rows.start // self.description.shard_size)
        stored = [self._rounded(array) for array in several]
        with replacing(path) as partial:
            # One record per group: reads are random, and floats hardly compress.
            writer = ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
            for number, name in enumerate(ids):
                # File names that are not UTF-8 contain lone surrogates.
                key = name.encode("utf-8", "surrogateescape")
                writer.write(len(key).to_bytes(4, "little") + key + stored[number].tobytes())
            writer.close()

    def told_rounding(self) -> str:
        """Returns the rounding error of the dtype, as text for users; "" if there is none."""
        dtype = self.description.dtype
        return (
            f"; {dtype} changes them by at most {self.rounding:.2g} of their norm"
            if self.rounding
            else ""
        )

    def _rounded(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the vectors in the description's dtype, and updates `rounding`.

        Raises:
          ValueError: a value is too large for the dtype.
        """
        stored = in_dtype(vectors, self.description.dtype)
        if not len(vectors) or vectors.dtype == stored.dtype:
            return stored
        exact = vectors.reshape(len(vectors), -1).astype(np.float64)
        error = stored.reshape(exact.shape).astype(np.float64) - exact
        length = np.maximum(np.linalg.norm(exact, axis=1), np.finfo(np.float32).tiny)
        worst = np.max(np.linalg.norm(error, axis=1) / length)
        self.rounding = max(self.rounding, float(np.nan_to_num(worst)))
        return stored

    def is_complete(self) -> bool:
        """Returns whether the files of all hosts exist."""
        return not missing_files(self.folder, self.description)


def in_dtype(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Returns vectors as a name of `DTYPES` says.

    Raises:
      ValueError: a number is too large for it.
    """
    with np.errstate(over="ignore"):  # told below
        stored = vectors.astype(DTYPES[dtype])
    over = np.isinf(stored.astype(np.float32)) & np.isfinite(vectors)
    if over.any():
        raise ValueError(
            f"Features reach {np.abs(vectors[over]).max():.3g}, which {dtype} cannot hold: store "
            "them as bfloat16 or float32."
        )
    return stored


def missing_files(folder: str | Path, description: EmbeddingDescription) -> list[Path]:
    """Returns the files that the description lists but that do not exist."""
    paths = [description.shard_path(folder, shard) for shard in range(description.shards)]
    return [path for path in paths if not path.exists()]


class EmbeddingStore:
    """Reads a complete folder: `store[i]` is the id and the float32 vector, None if unusable.

    Of several vectors it is the one that evaluation uses. Nothing is held in memory. A folder on an
    object store is copied into the cache folder, `cache_dir` or the user's.
    """

    def __init__(self, folder: str | Path, *, cache_dir: str = ""):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.folder = to_path(folder)
        self.description = EmbeddingDescription.read(folder)
        missing = missing_files(folder, self.description)
        if missing:
            raise FileNotFoundError(
                f"The embeddings in {folder} are not complete ({len(missing)} of "
                f"{self.description.shards} files are missing); run the same embed command again."
            )
        local = local_copy(self.folder, cache_dir)  # array_record can read only local files
        paths = [str(self.description.shard_path(local, s)) for s in range(self.description.shards)]
        try:
            self._records = ArrayRecordDataSource(paths)
        except RuntimeError as error:
            raise self._damaged(error) from error
        self._dtype = DTYPES[self.description.dtype]

    def __len__(self) -> int:
        return self.description.count

    def __getitem__(self, index: int) -> tuple[str, Float[np.ndarray, "..."] | None]:
        name, vectors = self.variants(index)
        return name, vectors[0] if len(vectors) else None

    def variants(self, index: int) -> tuple[str, Float32[np.ndarray, "n ..."]]:
        """Returns the id and all vectors of an example, (n, *shape); n = 0 if it is unusable."""
        ((name, body),) = self._read([index])
        return name, self._vectors(body, (-1, *self.description.shape))

    def rows(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[str], Float32[np.ndarray, "n ..."] | None]:
        """Returns the same as `stored`, but None as vectors if one is not finite or all zero."""
        names, vectors = self.stored(indices)
        if vectors is None:
            return names, None
        flat = vectors.reshape(len(vectors), -1)
        usable = np.isfinite(flat).all() and flat.any(axis=1).all()
        return names, vectors if usable else None

    def stored(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[str], Float32[np.ndarray, "n ..."] | None]:
        """Returns ids and vectors of several examples, read in one call.

        The vectors are None if one of the examples does not have exactly one.
        """
        parts = self._read(indices.tolist())
        names, bodies = [name for name, _ in parts], [body for _, body in parts]
        size = math.prod(self.description.shape) * np.dtype(self._dtype).itemsize
        if any(len(body) != size for body in bodies):
            return names, None
        return names, self._vectors(b"".join(bodies), (len(bodies), *self.description.shape))

    def _read(self, indices: list[int]) -> list[tuple[str, bytes]]:
        """Returns ids and bytes of examples; the reader verifies the checksums in the files."""
        try:
            if len(indices) == 1:  # the call for several records starts threads
                return [_parts(self._records[indices[0]])]
            return [_parts(record) for record in self._records.__getitems__(indices)]
        except (RuntimeError, UnicodeError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.folder} is damaged ({error}); {_AGAIN}.")

    def _vectors(self, body: bytes, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
        return np.frombuffer(body, self._dtype).astype(np.float32).reshape(shape)


def _parts(record: bytes) -> tuple[str, bytes]:
    """Returns the id and the bytes of the vectors of a record."""
    end = 4 + int.from_bytes(record[:4], "little")
    return record[4:end].decode("utf-8", "surrogateescape"), record[end:]
