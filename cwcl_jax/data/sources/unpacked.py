"""Parquet files unpacked once into Arrow streams, whose rows can be read without decoding."""

import fcntl
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.types as pat

from cwcl_jax.data.sources.arrow_files import ArrowFiles
from cwcl_jax.data.sources.row_groups import RowGroups

_LOG = logging.getLogger(__name__)
_BATCH_ROWS = 1000
_SECONDS_BETWEEN_NEWS = 20


class Unpacked:
    """The columns `tops` of a store, unpacked in `folder`.

    Opening it costs nothing: missing columns are unpacked when a row is first needed, while other
    threads and processes of this machine wait.
    """

    def __init__(self, store: RowGroups, tops: Sequence[str], folder: Path):
        self._store = store
        self._tops = list(tops)
        self._folder = folder
        self._lock = threading.Lock()
        self._opened: ArrowFiles | None = None

    def __len__(self) -> int:
        return len(self._store)

    def name_of(self, index: int) -> str:
        return self._store.name_of(index)

    def places(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def content(self) -> object:
        return self._store.content()

    def column(self, top: str) -> Iterator[pa.Array]:
        return self._store.column(top)

    def cells(self, index: int, tops: Sequence[str]) -> Mapping[str, pa.Scalar]:
        with self._lock:
            if self._opened is None:
                self._opened = self._unpack()
        return self._opened.cells(index, tops)

    def _unpack(self) -> ArrowFiles:
        self._folder.mkdir(parents=True, exist_ok=True)
        paths = [self._folder / f"{file:05d}.arrow" for file in range(len(self._store.paths))]
        with open(self._folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            schema = self._schema()
            told = -math.inf
            for file, path in enumerate(paths):
                if path.exists():
                    continue
                if time.monotonic() - told > _SECONDS_BETWEEN_NEWS:
                    told = time.monotonic()
                    source = self._store.paths[file]
                    _LOG.warning(
                        "Unpacking Parquet files to %s, once: %s, number %d of %d.",
                        *(self._folder, source.name, file + 1, len(paths)),
                    )
                self._write(file, schema, path)
        return ArrowFiles(paths)

    def _schema(self) -> pa.Schema:
        """Returns the columns' types, from the first file in which a column has any values."""
        kinds = []
        for top in self._tops:
            found = [schema.field(top).type for schema in self._store.schemas()]
            kinds.append((top, next((kind for kind in found if not pat.is_null(kind)), found[0])))
        return pa.schema(kinds)

    def _write(self, file: int, schema: pa.Schema, path: Path) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.unfinished")
        try:
            with pa.ipc.new_stream(str(temporary), schema) as writer:
                for table in self._store.tables(file, self._tops):
                    same = table.select(self._tops).cast(schema)
                    writer.write_table(same, max_chunksize=_BATCH_ROWS)
        except (pa.ArrowException, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(
                f"{self._store.paths[file]} cannot be unpacked to {path}: {error}. Without keep= "
                "only the rows that cannot be read are skipped."
            ) from error
        temporary.replace(path)

    def __reduce__(self):
        return Unpacked, (self._store, self._tops, self._folder)
