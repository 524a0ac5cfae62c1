"""The global order of examples: which example is at which position of which epoch.

The order is a function of (seed, epoch, position) alone, computed where it is needed: there is no
list of millions of indices, hosts need no agreement, and the number of hosts has no effect.
Permutations are Feistel networks with cycle walking (Black and Rogaway, 2002).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt64

from cwcl_jax.data.draws import hash_integers

_ROUNDS = 6
# Rounds for sizes of a few: after 6 some images are 7 % likelier than others, after 12 at most 1 %.
_ROUNDS_OF_SMALL = 12
# A few positions of a permutation take a millisecond, mostly calls of numpy, and all positions of
# a small one take some milliseconds: up to this size the whole permutation is computed and cached.
_KEPT = 1 << 16


def permute(positions: Int64[np.ndarray, " n"], size: int, *key: int) -> Int64[np.ndarray, " n"]:
    """Returns the images of `positions` under the permutation of range(size) given by `key`."""
    if size <= _KEPT:
        return _whole(size, *key)[positions]
    return _walk(positions, size, *key)


@functools.lru_cache(16)
def _whole(size: int, *key: int) -> Int64[np.ndarray, " n"]:
    return _walk(np.arange(size), size, *key)


def _walk(positions: Int64[np.ndarray, " n"], size: int, *key: int) -> Int64[np.ndarray, " n"]:
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(size, *key)
    values = _feistel(positions.astype(np.uint64), half, keys)
    # The network permutes range(a power of four >= `size`): apply it until values are inside.
    outside = values >= size
    while outside.any():
        values[outside] = _feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


@functools.lru_cache(256)
def _round_keys(size: int, *key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(hash_integers(*key, size, r)) for r in range(_ROUNDS))


def permute_each(
    positions: Int64[np.ndarray, " n"],
    sizes: Int64[np.ndarray, " n"],
    each: Int64[np.ndarray, " n"],
    *key: int,
) -> Int64[np.ndarray, " n"]:
    """Returns the image of each position under its own permutation.

    Args:
      positions: position i is below sizes[i].
      each: selects the permutation of range(sizes[i]), together with `key`.
    """
    # Number of bits of the largest position; numpy has no bit_length for arrays.
    bits = np.frexp((sizes - 1).astype(np.float64))[1]
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    own = _scramble(each.astype(np.uint64) ^ np.uint64(hash_integers(*key)))
    keys = [_scramble(own ^ np.uint64(hash_integers(r))) for r in range(_ROUNDS_OF_SMALL)]
    values = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(values >= sizes.astype(np.uint64))).size:
        values[outside] = _feistel(values[outside], half[outside], [k[outside] for k in keys])
    return values.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " n"],
    half: int | UInt64[np.ndarray, " n"],
    keys: Sequence[np.uint64] | Sequence[UInt64[np.ndarray, " n"]],
) -> UInt64[np.ndarray, " n"]:
    shift = np.uint64(half) if isinstance(half, int) else half
    mask = (np.uint64(1) << shift) - np.uint64(1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return left << shift | right


def _scramble(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Returns SplitMix64's finaliser of each element."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@dataclass(frozen=True)
class GlobalOrder:
    """Order of one or several parts (a mixture), whose examples are numbered consecutively.

    An epoch has `per_epoch` positions. Each part fills a fixed number of them (its share of the
    weights), drawn from the part without replacement, with a new draw in every epoch. A part whose
    number exceeds its length starts again with a new draw. Positions of all parts are shuffled
    together. Without `shuffle` everything keeps its order, and the parts follow each other.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    per_epoch: int
    seed: int
    shuffle: bool = True

    @property
    def quotas(self) -> tuple[int, ...]:
        """Positions of an epoch that each part fills (largest remainders get the rest)."""
        total = sum(self.weights)
        exact = [self.per_epoch * weight / total for weight in self.weights]
        quotas = [int(value) for value in exact]
        by_rest = sorted(range(len(exact)), key=lambda k: (quotas[k] - exact[k], k))
        for k in by_rest[: self.per_epoch - sum(quotas)]:
            quotas[k] += 1
        return tuple(quotas)

    def indices(
        self, epoch: int, positions: Int64[np.ndarray, " n"], attempt: int = 0
    ) -> Int64[np.ndarray, " n"]:
        """Returns the example numbers at `positions` of an epoch.

        `attempt` > 0 returns replacements for unusable examples: from the same part, half its
        length further in its order, so that a replacement is not near the positions it could repeat
        (and outside the epoch's subset if that is less than half of the part).
        """
        if self.shuffle and len(self.lengths) > 1:
            positions = permute(positions, self.per_epoch, self.seed, epoch, 1)
        result = np.empty_like(positions)
        start = first = 0
        for part, (length, quota) in enumerate(zip(self.lengths, self.quotas, strict=True)):
            inside = (positions >= start) & (positions < start + quota)
            if inside.any():
                ranks = positions[inside] - start
                result[inside] = first + self._of_part(part, length, epoch, ranks, attempt)
            start, first = start + quota, first + length
        return result

    def _of_part(
        self, part: int, length: int, epoch: int, ranks: Int64[np.ndarray, " n"], attempt: int
    ) -> Int64[np.ndarray, " n"]:
        passes, ranks = np.divmod(ranks, length)
        if attempt:
            ranks = (ranks + length // 2 + attempt - 1) % length
        if not self.shuffle:
            return ranks
        result = np.empty_like(ranks)
        for number in np.unique(passes):
            chosen = passes == number
            key = (self.seed, epoch, 2 + part, int(number))
            result[chosen] = permute(ranks[chosen], length, *key)
        return result
