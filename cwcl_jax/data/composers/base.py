"""What composes batches on purpose, and the order of examples that comes of it.

A composer knows the examples, the batch's size and the seed; it says how many batches an epoch has
and which examples stand in each. It knows no host, thread or step of training: batch `step` of an
epoch is a function of (seed, epoch, step) alone, so hosts and resumed runs agree without a word.
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
# Batches of later epochs in which a replacement is looked for.
_EPOCHS_LOOKED_AT = 8


class ComposerError(ValueError):
    """Batches cannot be composed as asked."""


class Composition:
    """The batches of every epoch.

    Attributes:
      steps: batches of an epoch, the same number in each.
      told: what the batches are, in words.
      left_out: why examples are in no batch of an epoch, and how many.
    """

    steps: int
    told: str = ""
    left_out: Mapping[str, int] = MappingProxyType({})

    def batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        """Returns the numbers of the examples of a batch, each once."""
        raise NotImplementedError

    def replacements(self, epoch: int, step: int, row: int) -> Iterator[int]:
        """Yields what may stand for an unusable example, in the order in which it is tried.

        Here: what stands in the same row of other batches, so that rows differ in theirs.
        """
        batch = set(self.batch(epoch, step).tolist())
        for other in self.others(epoch, step):
            if (example := int(self.batch(*other)[row])) not in batch:
                yield example

    def others(self, epoch: int, step: int) -> Iterator[tuple[int, int]]:
        """Yields (epoch, step) of other batches: half an epoch further on first, then later ones.

        Those of later epochs hold what this epoch leaves out.
        """
        for ahead in range(_EPOCHS_LOOKED_AT):
            for far in range(self.steps):
                place = (step + self.steps // 2 + far) % self.steps
                if ahead or place != step:
                    yield epoch + ahead, place

    def fingerprint(self) -> str:
        """Returns a text that changes with what the batches are made from."""
        raise NotImplementedError


# Of the examples of a source in batches of a size.
Compose = Callable[[Source, int], Composition]


class ComposedOrder:
    """The order of examples that composed batches stand in; as `GlobalOrder`, by positions.

    Args:
      compose: gives the batches of a source, whole or of some examples.
      per_epoch: the most examples of an epoch; 0 = as many as the batches hold.
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
        """Examples of an epoch: whole batches."""
        return self.steps * self._size

    @property
    def left_out_share(self) -> float:
        """The share of the examples that an epoch leaves out."""
        return 1 - self.per_epoch / len(self._source)

    @property
    def told(self) -> str:
        """What the batches are and what an epoch leaves out, in words."""
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
        """Returns a text that changes with what the batches are made from."""
        return self._whole.fingerprint()

    def indices(
        self, epoch: int, positions: Int64[np.ndarray, " n"], attempt: int = 0
    ) -> Int64[np.ndarray, " n"]:
        """Returns the example numbers at `positions` of an epoch, or their replacements.

        Raises:
          RuntimeError: nothing is left to stand for an unusable example.
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
        """Whose batch stands at a step, under which number, and the numbers of its examples."""
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
        raise RuntimeError(
            f"Nothing can stand for the unusable example in row {row} of batch {step} of epoch "
            f"{epoch} without breaking what the batches promise. Repair the data."
        )

    def taken(self, epoch: int, step: int) -> list[list[int]]:
        """Returns [batch size, batches] of an epoch up to a step, in the order they were taken."""
        rest = self._rest
        if epoch != rest.epoch:
            return [[self._size, step]]
        return [*rest.taken, [self._size, step - (self.steps - rest.steps)]]

    def go_on(self, epoch: int, taken: Sequence[Sequence[int]]) -> tuple[int, int]:
        """Returns (epoch, step) of the batch that follows what `taken` of an epoch says.

        Where batches had another size, those examples of the epoch that no batch had are composed
        anew, and stand in its last steps.
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
                "The %d examples left of epoch %d make no batch of %d; the next epoch begins.",
                *(len(numbers), epoch, self._size),
            )
            return epoch + 1, 0
        self._rest = _Rest(epoch, [list(pair) for pair in before], numbers, composition, count)
        return epoch, self.steps - count + done


class _Rest:
    """What follows in an epoch that began in batches of another size."""

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
    """Returns a short hash of what arrays hold."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:16]
