"""Atomic writes of files, and locks between processes.

Processes may run on several hosts that share a file system, which may not support `flock`, or an
object store (`cwcl_jax.paths`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cwcl_jax.paths import StorePath

# Errors of `flock` on a file system without locks: Lustre mounted so, some NFS.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Seconds between two checks of a lock that another process holds.
_POLL = 0.5
# For files that act as locks: seconds after which the holder writes its file again, and after which
# a file without new writes is considered abandoned.
_RENEW, _STALE = 5.0, 30.0
# As `_STALE` on an object store, where a write may be tried again for a minute.
_STALE_ON_STORE = 90.0


class InUse(Exception):
    """Another process holds the lock; the text names it if it is known."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which replaces `path` at the end.

    Readers of `path` see the old file or the complete new one. If several processes write it at the
    same time, the last one wins. After an error nothing is left. If `path` is on an object store,
    the temporary path is on this machine's disk.
    """
    if isinstance(path, StorePath):
        with tempfile.TemporaryDirectory(prefix="cwcl_jax-") as folder:
            partial = Path(folder, path.name)
            yield partial
            path.upload(partial)
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
      ValueError: it is not JSON or not UTF-8, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def side_output(what: str) -> Iterator[None]:
    """Continues without an output that cannot be written, after a warning with the reason.

    It is for outputs that a run does not need: pictures, TensorBoard, caches. Checkpoints, metrics
    and results are written outside of it, and their errors end the run.

    Args:
      what: names the output in the warning.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: {what} could not be written: {reason}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(path: Path, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lock `path`, which is released in any case when the process ends.

    On a file system without locks, or an object store, a file next to `path` acts as the lock. It
    is created exclusively (on a store by a conditional request), rewritten every few seconds, and
    taken over by the next process half a minute (on a store, a minute and a half) after its owner
    died. A process that slept for longer than that may believe for a few seconds that it still
    holds the lock.

    Args:
      waiting: called twice a second while another process holds the lock; without it, nothing
          waits.

    Raises:
      InUse: another process holds the lock, and `waiting` is None.
    """
    while True:
        try:
            give_back = _take(path, waiting or (lambda: None))
            break
        except InUse:
            if waiting is None:
                raise
            waiting()
            time.sleep(_POLL)
    try:
        yield
    finally:
        give_back()


def _take(path: Path, waiting: Callable[[], None]) -> Callable[[], None]:
    """Takes the lock and returns a function that releases it."""
    if isinstance(path, StorePath):
        return _HeldFile(path.with_name(path.name + ".held"), waiting).give_back
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        with file:
            raise InUse(file.read().strip()) from error
    except OSError as error:
        file.close()
        if error.errno not in _NO_LOCKS:
            raise
        return _HeldFile(path.with_name(path.name + ".held"), waiting).give_back
    file.truncate(0)
    file.write(_who() + "\n")
    file.flush()
    return file.close


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


class _HeldFile:
    """A file that exists as long as its process holds a lock, and changes meanwhile."""

    def __init__(self, path: Path, waiting: Callable[[], None]):
        self._path = path
        self._mine = f"{_who()}, {uuid.uuid4().hex[:12]}"
        self._end = threading.Event()
        if not self._make():
            _remove_if_abandoned(path, waiting)
            if not self._make():
                raise InUse(_text(path).partition(",")[0])
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def _make(self) -> bool:
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(f"{self._mine}, 0")
        except FileExistsError:
            return False
        return True

    def _is_mine(self) -> bool:
        return _text(self._path).startswith(self._mine)

    def _renew(self) -> None:
        count = 0
        while not self._end.wait(_RENEW):
            with contextlib.suppress(OSError):  # after a temporary error, the next renewal writes
                if not self._is_mine():
                    return
                count += 1
                self._path.write_text(f"{self._mine}, {count}", encoding="utf-8")

    def give_back(self) -> None:
        """Removes the file."""
        self._end.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)


def _remove_if_abandoned(path: Path, waiting: Callable[[], None]) -> None:
    """Removes a lock's file that no longer changes; returns as soon as it changes.

    No clock is compared with another machine's. Two processes that find the same file abandoned
    remove it one after the other, and the second one only if it is still the same.
    """
    stale = _STALE_ON_STORE if isinstance(path, StorePath) else _STALE
    before, end = _text(path), time.monotonic() + stale
    while time.monotonic() < end:
        time.sleep(_POLL)
        waiting()
        if _text(path) != before:
            return
    removing = path.with_name(path.name + ".removing")
    try:
        removing.touch(exist_ok=False)
    except FileExistsError as error:
        raise InUse(f"a process that is gone; if it is, remove {removing} and {path}") from error
    try:
        if _text(path) == before:
            path.unlink(missing_ok=True)
    finally:
        removing.unlink(missing_ok=True)


def _text(path: Path) -> str:
    """Returns the content of a lock's file.

    It is reopened, so that a network file system asks its server.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is one that programs create by themselves.

    Examples are `._x`, `__MACOSX` and other hidden files.
    """
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def matching(folder: Path, pattern: str) -> list[Path]:
    """Returns the files of a folder that match a pattern, sorted, without hidden ones."""
    return sorted(file for file in folder.glob(pattern) if not is_hidden(file.name))
