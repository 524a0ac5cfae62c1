"""A log file of every process of a job, next to the run's other files.

Process 0 writes to the terminal and to its file. The other processes' output, including that of
compiled libraries, goes only to their files; only their final messages (an exception, the
watchdog's stacks) also reach the terminal.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import jax


class Tee:
    """A text stream that writes to several, of which only the first must work."""

    def __init__(self, streams: Iterable[IO[str]]):
        self._streams = list(streams)

    def write(self, text: str) -> int:
        self._streams[0].write(text)
        for stream in self._streams[1:]:
            with contextlib.suppress(OSError):  # a lost line of a log must not end the run
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        self._streams[0].flush()

    def __getattr__(self, name: str) -> Any:  # isatty, fileno, encoding of the first stream
        return getattr(self._streams[0], name)


@runtime_checkable
class TextOutput(Protocol):
    """Anything that accepts text: a file, the terminal, or the stream of a notebook or a test."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class ProcessLog:
    """The outputs of this process.

    Attributes:
      last_words: streams with a descriptor for essential messages: the terminal and the file.
    """

    def __init__(self, last_words: list[TextOutput]):
        self.last_words = last_words

    def say(self, text: str) -> None:
        """Writes to terminal and file; continues if the disk is full."""
        for stream in self.last_words:
            try:
                stream.write(text)
                stream.flush()
            except (OSError, ValueError):
                continue


def open_process_log(folder: Path | None) -> ProcessLog:
    """Redirects this process's output and returns its log; nothing changes in a job of one process.

    Args:
      folder: folder for `process-N.log`, which every start continues; None for no files.
    """
    if folder is None or jax.process_count() == 1:
        return ProcessLog([sys.stderr])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"process-{jax.process_index()}.log"
    file = path.open("a", encoding="utf-8", buffering=1)
    file.write(_header())
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        terminal = sys.stderr
        sys.stdout = Tee([sys.stdout, file])
        sys.stderr = Tee([sys.stderr, file])
        return ProcessLog([terminal, file])
    terminal = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    return ProcessLog([terminal, file])


def _header() -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return (
        f"--- {now} process {jax.process_index()} of {jax.process_count()} on "
        f"{socket.gethostname()}, pid {os.getpid()}\n"
    )
