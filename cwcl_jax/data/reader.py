"""Reads rows with grain's threads: chunks of a few rows each, loaded ahead and in order."""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from cwcl_jax.data.options import DataConfig

# Rows that a reader thread loads in one call: enough to hide the cost of passing them on, and few
# enough to distribute the first batch over the threads.
CHUNK = 16


def reader_threads(asked: int) -> int:
    """Returns `asked`, or this process's share of the cores, at most 16, as number of threads.

    The share is that of the cores that the process may use, divided by the number of processes that
    share them according to the launcher (CWCL_LOCAL_PROCESSES).
    """
    if asked:
        return asked
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    sharing = int(os.environ.get("CWCL_LOCAL_PROCESSES") or 1)
    return min(16, max(1, cores // sharing))


class ChunkedReader:
    """Yields `local_size` rows for each step, in chunks that grain's threads load in order.

    `load(step, rows)` returns the chunk of at most `chunk` rows for these rows of a batch; it runs
    in several threads.
    """

    def __init__(
        self,
        load: Callable[[int, np.ndarray], Any],
        *,
        local_size: int,
        steps: int,
        config: DataConfig,
        chunk: int = CHUNK,
    ):
        self._rows = max(d for d in range(1, min(chunk, local_size) + 1) if local_size % d == 0)
        self._per_batch = local_size // self._rows
        threads = reader_threads(config.threads)
        ahead = max(threads, self._per_batch * max(1, config.prefetch))

        self._load = load
        self._chunks = grain.MapDataset.range(steps * self._per_batch)
        self._options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._iterator: Any = None
        self._opening: object | None = None
        self._running = 0
        self._idle = threading.Condition()

    def _load_chunk(self, opening: object, number: int) -> Any:
        """Returns one chunk; None if the reader was closed after this thread was started.

        Such a thread may still run when `start` begins again. The rows that it would count as read
        or skipped are counted by the new threads.
        """
        step, chunk = divmod(int(number), self._per_batch)
        with self._idle:
            if opening is not self._opening:
                return None
            self._running += 1
        try:
            return self._load(step, np.arange(chunk * self._rows, (chunk + 1) * self._rows))
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def start(self, step: int) -> None:
        """Starts (again) at a step; the threads start with the first call of `next_chunks`."""
        self.close()
        self._opening = opening = object()
        chunks = self._chunks.map(functools.partial(self._load_chunk, opening))
        self._iterator = iter(chunks.to_iter_dataset(self._options))
        self._iterator.set_state({"next_index": step * self._per_batch})

    def next_chunks(self) -> list[Any]:
        """Returns the chunks of the next step, waiting for them if necessary."""
        return [next(self._iterator) for _ in range(self._per_batch)]

    def close(self) -> None:
        """Ends the threads after their current chunks; `start` begins again."""
        with self._idle:
            self._opening = None
            self._idle.wait_for(lambda: self._running == 0)
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
