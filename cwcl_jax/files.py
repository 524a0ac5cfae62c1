"""Files that are written whole or not at all, and locks between processes.

Processes may run on several hosts that share a file system, also one that knows no `flock`, or an
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

# What `flock` says on a file system without locks: Lustre mounted so, some NFS.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Seconds between two looks at a lock that another process holds.
_POLL = 0.5
# Where files stand for locks: seconds after which the holder writes into its file again, and
# after which a file that nobody wrote into belongs to a process that is gone.
_RENEW, _STALE = 5.0, 30.0
# As `_STALE` on an object store, where a write may be tried again for a minute.
_STALE_ON_STORE = 90.0


class InUse(Exception):
    """Another process holds the lock; the text says which, as far as it is known."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end.

    Whoever reads `path` sees the old file or the whole new one; of several processes that write it
    at the same time, the last one's stays. After an error nothing is left. For an object on a store
    the path is one of a temporary folder of this machine.
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
    """Returns what a JSON text says.

    Raises:
      ValueError: it is no JSON or no UTF-8, or is nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def side_output(what: str) -> Iterator[None]:
    """Goes on without an output that cannot be made, after a warning that says why.

    For what a run can do without: pictures, TensorBoard, caches. Checkpoints, metrics and results
    are written outside of it, and their errors end the run.

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
    """Holds the lock `path`, which the end of the process gives back in any case.

    On a file system without locks, or an object store, a file beside `path` stands for it: made
    exclusively (on a store by a conditional request), written anew every few seconds, and taken
    over by the next process half a minute (a minute and a half) after its own one died. A process
    that slept for longer than that may believe for a few seconds more that it holds the lock.

    Args:
      waiting: called twice a second while another process holds the lock; without it nothing waits.

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
    """Takes the lock and returns what gives it back."""
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
            with contextlib.suppress(OSError):  # what a moment's trouble kept, the next one writes
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
    """Removes a lock's file that does not change any more; returns as soon as it does.

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
    """What is in a lock's file; opened anew, so that a network's file system asks its server."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder is what programs leave beside people's own (`._x`, `__MACOSX`)."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def matching(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match a pattern, in order, without hidden ones."""
    return sorted(file for file in folder.glob(pattern) if not is_hidden(file.name))
