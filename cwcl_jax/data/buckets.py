"""Batches of recordings of similar length, so that little is computed for padding.

Within a window of several batches the examples are sorted by length and cut into batches, whose
order is then shuffled. A batch has one of a few fixed lengths, so the step is compiled once for
each. Everything follows from the global order, the lengths and the seed, and not from hosts or
threads, so any step can be computed separately.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

from cwcl_jax.data.order import GlobalOrder, permute


class BucketedOrder:
    """The examples of each global batch, and the length of the batch in seconds.

    Args:
      order: the order of examples before they are sorted.
      durations: seconds of every example.
      lengths: allowed lengths of batches in seconds, ascending; longer recordings are cropped.
      batch_size: examples of a global batch.
      window: number of batches that are sorted together.
      steps: batches of an epoch.
    """

    def __init__(
        self,
        order: GlobalOrder,
        durations: Float64[np.ndarray, " n"],
        *,
        lengths: Sequence[float],
        batch_size: int,
        window: int,
        steps: int,
    ):
        self._order = order
        self._durations = durations
        self._lengths = np.asarray(lengths)
        self._size = batch_size
        self._window = window
        self._steps = steps
        # Threads read rows of neighbouring batches, so a few windows are in use at a time.
        self._cached = functools.lru_cache(8)(self._batches)

    def batch(self, epoch: int, step: int) -> tuple[Int64[np.ndarray, " b"], float]:
        """Returns the example numbers of a step of an epoch, and its batch's length in seconds."""
        window, place = divmod(step, self._window)
        indices = self._cached(epoch, window)[place]
        longest = float(self._durations[indices].max())
        fitting = np.searchsorted(self._lengths, longest)
        return indices, float(self._lengths[min(int(fitting), len(self._lengths) - 1)])

    def _batches(self, epoch: int, window: int) -> Int64[np.ndarray, "w b"]:
        first = window * self._window
        count = min(self._window, self._steps - first)
        positions = np.arange(first * self._size, (first + count) * self._size)
        indices = self._order.indices(epoch, positions)
        by_length = indices[np.argsort(self._durations[indices], kind="stable")]
        places = np.arange(count)
        if self._order.shuffle:
            places = permute(places, count, self._order.seed, 54, epoch, window)
        return by_length.reshape(count, self._size)[places]
