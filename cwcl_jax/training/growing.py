"""A file that grows during a run, on a disk or on an object store."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

from cwcl_jax.paths import is_url


class Growing:
    """A file that grows: appended if it is local, and rewritten now and then on a store.

    Only one process may write it. A killed process loses what it appended since the last `flush` if
    the file is on a store; a local file has it when `append` returns.
    """

    # Seconds between two writes of an object, and the maximal fraction of time for them.
    _EVERY, _SHARE = 10.0, 0.02

    def __init__(self, path: Path):
        self._path = path
        self._due = time.monotonic() + self._EVERY
        self._lock = threading.Lock()
        self._changed = False
        self._file: Any = None
        if is_url(path):
            self._data = bytearray(path.read_bytes() if path.exists() else b"")
        else:
            # Unbuffered: `close` must not try again to write what could not be written.
            self._file = path.open("ab", buffering=0)

    def append(self, data: bytes) -> None:
        """Appends the bytes.

        Raises:
          OSError: not all could be written. The error names the file.
        """
        if self._file is not None:
            _append_whole(self._file, data, self._path)
            return
        with self._lock:
            self._data += data
            self._changed = True
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Writes new data to the store."""
        with self._lock:
            if self._file is not None or not self._changed:
                return
            start = time.monotonic()
            self._path.write_bytes(self._data)
            self._changed = False
            taken = time.monotonic() - start
            self._due = start + max(self._EVERY, taken / self._SHARE)

    def close(self) -> None:
        """Writes new data and closes the file."""
        self.flush()
        if self._file is not None:
            self._file.close()


def _append_whole(file: Any, data: bytes, path: Path) -> None:
    try:
        written = file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if written != len(data):  # the disk is full after a part
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
