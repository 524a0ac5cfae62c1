"""Batches that are composed on purpose, and the resulting order of examples.

A composer knows the examples, the batch size and the seed. It determines the number of batches in
an epoch and the examples of each. It does not know hosts, threads or training steps: batch `step`
of an epoch is a function of (seed, epoch, step) alone, so hosts and resumed runs agree without
communication.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Int64

from cwcl_jax.data.sources.base import Source
from cwcl_jax.data.sources.subset import Subset

_LOG = logging.getLogger(__name__)
# Later epochs whose batches are searched for a replacement.
_EPOCHS_LOOKED_AT = 8


class ComposerError(ValueError):
    """Batches cannot be composed as requested."""


class Composition:
    """The batches of every epoch.

    Attributes:
      steps: number of batches in an epoch, the same in each.
      told: description of the batches for users.
      left_out: number of examples that are in no batch of an epoch, by reason.
    """

    steps: int
    told: str = ""
    left_out: Mapping[str, int] = MappingProxyType({})

    def batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        """Returns the numbers of the examples of a batch, (batch_size,), without repetition."""
        raise NotImplementedError

    def replacements(self, epoch: int, step: int, row: int) -> Iterator[int]:
        """Yields replacements for an unusable example, in the order in which they are tried.

        By default these are the examples in the same row of other batches, so that different rows
        have different replacements.
        """
        batch = set(self.batch(epoch, step).tolist())
        for other in self.others(epoch, step):
            if (example := int(self.batch(*other)[row])) not in batch:
                yield example

    def others(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, step) of other batches: first those half an epoch ahead, then later ones.

        Batches of later epochs contain the examples that this epoch leaves out.
        """
        for ahead in range(_EPOCHS_LOOKED_AT):
            for far in range(self.steps):
                place = (step + self.steps // 2 + far) % self.steps
                if ahead or place != step:
                    yield epoch + ahead, place

    def fingerprint(self) -> str:
        """Returns a text that changes if the batches change."""
        raise NotImplementedError


# Composes the examples of a source into batches of a size.
Compose = Callable[[Source, int], Composition]


class ComposedOrder:
    """The order of examples in composed batches, by position as in `GlobalOrder`.

    Args:
      compose: returns the batches of a source, or of a subset of it.
      per_epoch: maximal number of examples in an epoch; 0 = as many as the batches hold.
    """

    def __init__(self, compose: Compose, source: Source, batch_size: int, per_epoch: int = 0):
        self._compose = compose
        self._source = source
        self._size = batch_size
        self._most = per_epoch or len(source)
        self._whole = compose(source, batch_size)
        self.steps = min(self._whole.steps, self._most // batch_size)
        self._rest = self._no_rest()
        # Threads read rows of neighbouring batches.
        self._kept = functools.lru_cache(16)(self._batch)

    def _no_rest(self) -> "_Rest":
        return _Rest(-1, [], np.zeros(0, np.int64), self._whole, 0)

    @property
    def per_epoch(self) -> int:
        """Number of examples in an epoch, whole batches only."""
        return self.steps * self._size

    @property
    def left_out_share(self) -> float:
        """Share of the examples that an epoch leaves out."""
        return 1 - self.per_epoch / len(self._source)

    @property
    def told(self) -> str:
        """Description, for users, of the batches and of the examples that an epoch leaves out."""
        total = len(self._source)
        reasons = dict(self._whole.left_out)
        if short := total - self.per_epoch - sum(reasons.values()):
            reasons["at the end of an epoch"] = short
        shares = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
        return (
            f"{self._whole.told}; an epoch is {self.steps} batches and leaves out "
            f"{100 * self.left_out_share:.2g}% of {total} examples"
            + (f": {shares}" if shares else "")
        )

    def fingerprint(self) -> str:
        """Returns a text that changes if the batches change."""
        return self._whole.fingerprint()

    def indices(
        self, epoch: int, positions: Int64[np.ndarray, " n"], attempt: int = 0
    ) -> Int64[np.ndarray, " n"]:
        """Returns the example numbers at `positions` of an epoch, or their replacements.

        Raises:
          ComposerError: no replacement is left for an unusable example.
        """
        steps, rows = np.divmod(positions, self._size)
        if not attempt:
            batches = {int(step): self._kept(epoch, int(step)) for step in np.unique(steps)}
            pairs = zip(steps.tolist(), rows.tolist(), strict=True)
            return np.array([batches[step][row] for step, row in pairs], np.int64)
        found = [
            self._replacement(epoch, step, row, attempt)
            for step, row in zip(steps.tolist(), rows.tolist(), strict=True)
        ]
        return np.array(found, np.int64)

    def _place(self, epoch: int, step: int) -> tuple[Composition, int, Int64[np.ndarray, " n"]]:
        """Returns composition and step of a batch, and the example numbers (empty = all)."""
        rest = self._rest
        if epoch == rest.epoch:
            return rest.composition, step - (self.steps - rest.steps), rest.numbers
        return self._whole, step, np.zeros(0, np.int64)

    def _batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        composition, step, numbers = self._place(epoch, step)
        batch = composition.batch(epoch, step)
        return numbers[batch] if numbers.size else batch

    def _replacement(self, epoch: int, step: int, row: int, attempt: int) -> int:
        composition, place, numbers = self._place(epoch, step)
        possible = itertools.islice(
            composition.replacements(epoch, place, row), attempt - 1, attempt
        )
        for example in possible:
            return int(numbers[example]) if numbers.size else example
        raise ComposerError(
            f"no other example can take its place in batch {step} of epoch {epoch}, which has to "
            "stay as composed: repair the example or leave it out of the data, or lower "
            "config.global_batch_size, so that more batches can give one"
        )

    def taken(self, epoch: int, step: int) -> list[list[int]]:
        """Returns [batch size, batches] of an epoch up to a step, in order."""
        rest = self._rest
        if epoch != rest.epoch:
            return [[self._size, step]]
        return [*rest.taken, [self._size, step - (self.steps - rest.steps)]]

    def go_on(self, epoch: int, taken: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Returns (epoch, step) of the batch that follows the batches `taken` of an epoch.

        If earlier batches had another size, the unused examples of the epoch are composed anew and
        fill its last steps.
        """
        *before, (size, done) = [(int(size), int(steps)) for size, steps in taken]
        if size != self._size:
            before, done = [*before, (size, done)], 0
        self._rest = self._no_rest()
        self._kept.cache_clear()
        before = [(size, steps) for size, steps in before if steps]
        if not before:
            return epoch, done
        numbers, left = np.arange(len(self._source)), self._source
        for size, steps in before:
            composition = self._compose(left, size)
            used = [composition.batch(epoch, step) for step in range(steps)]
            numbers = np.delete(numbers, np.concatenate(used))
            left = Subset(self._source, numbers)
        room = (self._most - sum(size * steps for size, steps in before)) // self._size
        try:
            composition = self._compose(left, self._size)
            count = max(0, min(composition.steps, room, self.steps))
        except ComposerError:
            composition, count = self._whole, 0
        if not count:
            _LOG.warning(
                "The %d examples left of epoch %d do not fill a batch of %d; the next epoch "
                "begins.",
                *(len(numbers), epoch, self._size),
            )
            return epoch + 1, 0
        self._rest = _Rest(epoch, [list(pair) for pair in before], numbers, composition, count)
        return epoch, self.steps - count + done


class _Rest:
    """The remaining batches of an epoch that began with another batch size."""

    def __init__(
        self,
        epoch: int,
        taken: list[list[int]],
        numbers: Int64[np.ndarray, " n"],
        composition: Composition,
        steps: int,
    ):
        self.epoch, self.taken, self.numbers = epoch, taken, numbers
        self.composition, self.steps = composition, steps


def digest(*arrays: np.ndarray) -> str:
    """Returns a short hash of the contents of arrays."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:16]
