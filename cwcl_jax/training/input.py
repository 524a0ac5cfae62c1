"""Puts batches onto the devices ahead of the step, each with its data position."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from cwcl_jax.training import sharding


@runtime_checkable
class Batches(Protocol):
    """Interface of the training data; see `cwcl_jax.data.pipeline.train_batches`."""

    steps_per_epoch: int
    source: Any

    @property
    def skipped(self) -> Mapping[str, int]: ...

    @property
    def tokens_cut(self) -> int: ...

    @property
    def left_out(self) -> float | None: ...

    @property
    def told(self) -> str: ...

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def fingerprint(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


class DeviceBatch(NamedTuple):
    """A batch on the devices.

    Attributes:
      arrays: global arrays by tower.
      index: this process's example numbers.
      data_state: the position after this batch, to be saved with the step that used it.
    """

    arrays: dict[str, Any]
    index: np.ndarray
    data_state: dict[str, Any]


class DeviceInput:
    """An iterator of DeviceBatch that a thread keeps `depth` batches ahead.

    Attributes:
      waited: seconds that `next` spent waiting, since the last `reset_wait`.
    """

    def __init__(self, batches: Batches, mesh: Mesh, *, depth: int = 2):
        self._batches = batches
        self._mesh = mesh
        self._queue: queue.Queue[DeviceBatch | BaseException] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self.waited = 0.0
        self._thread = threading.Thread(target=self._fill, name="device-input", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                self._put(self._next_batch())
        except BaseException as error:  # reaches the loop through the queue
            self._put(error)

    def _next_batch(self) -> DeviceBatch:
        batch = dict(next(self._batches))
        index = batch.pop("index")
        state = self._batches.get_state()
        return DeviceBatch(sharding.put_batch(self._mesh, batch), index, state)

    def _put(self, item: DeviceBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[DeviceBatch]:
        return self

    def __next__(self) -> DeviceBatch:
        start = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - start
        if isinstance(item, BaseException):
            raise item
        return item

    @property
    def skipped(self) -> int:
        """Number of different unusable examples of this process since its start."""
        return sum(self._batches.skipped.values())

    @property
    def tokens_cut(self) -> int:
        """Number of tokens that this process's tokenizers truncated since its start."""
        return self._batches.tokens_cut

    @property
    def left_out(self) -> float | None:
        """The share of examples that an epoch of composed batches leaves out; None for others."""
        return self._batches.left_out

    def reset_wait(self) -> float:
        """Returns the seconds waited since the last call."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """Ends the thread and the data iterator."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._batches.close()
