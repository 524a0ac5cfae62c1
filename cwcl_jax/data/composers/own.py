"""Batches that a user's function composes, one epoch at a time."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int64

from cwcl_jax.data.composers.base import ComposerError, Composition, digest
from cwcl_jax.data.sources.base import Source, SourceLine, call_with_options


class Own(Composition):
    """The batches of a function `compose(source, *, epoch, batch_size, seed, **options)`.

    It returns (steps, batch_size) example numbers, the same for the same arguments, and the same
    number of steps in each epoch. It declares those of epoch, batch_size and seed that it needs,
    and its options, whose values come from the line.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        line: SourceLine,
        *,
        source: Source,
        batch_size: int,
        seed: int,
    ):
        self._function, self._line, self._source = function, line, source
        self._batch_size, self._seed = batch_size, seed
        self._epoch = functools.lru_cache(2)(self._call)
        first = self._call(0)
        self.steps = len(first)
        if not self.steps:
            raise ComposerError(f"{line.kind} returns no batch of {batch_size}")
        used = len(np.unique(first))
        self.told = f"by {line.kind}"
        if twice := first.size - used:
            self.told += f" ({twice} of {first.size} examples of epoch 0 are repeated)"
        self.left_out = {"that it does not name": len(source) - used}
        self._first = digest(first)

    def _call(self, epoch: int) -> Int64[np.ndarray, "s b"]:
        name, size = self._line.kind, self._batch_size
        values = {"epoch": epoch, "batch_size": size, "seed": self._seed}
        try:
            given = call_with_options(
                self._function, self._source, self._line, values, what="composer", further=()
            )
            batches = np.asarray(given)
        except ComposerError:
            raise
        except Exception as error:
            raise ComposerError(f"{name} fails: {type(error).__name__}: {error}") from error
        if batches.ndim != 2 or batches.shape[1] != size or batches.dtype.kind not in "iu":
            raise ComposerError(
                f"{name} returns {batches.dtype} of shape {batches.shape}; expected are example "
                f"numbers of shape (steps, {size})"
            )
        batches = batches.astype(np.int64)
        if batches.size and not 0 <= batches.min() <= batches.max() < len(self._source):
            raise ComposerError(
                f"{name} returns the examples {batches.min()} to {batches.max()}; there are 0 to "
                f"{len(self._source) - 1}"
            )
        ordered = np.sort(batches, axis=1)
        repeated = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
        if len(repeated):
            step, row = repeated[0].tolist()
            raise ComposerError(
                f"{name} puts the example {ordered[step, row]} into batch {step} of epoch {epoch} "
                "twice: it would be its own negative"
            )
        return batches

    def batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        batches = self._epoch(epoch)
        if len(batches) != self.steps:
            raise ComposerError(
                f"{self._line.kind} returns {len(batches)} batches in epoch {epoch}, but "
                f"{self.steps} in epoch 0; all epochs must have the same number"
            )
        return batches[step]

    def fingerprint(self) -> str:
        return self._first
