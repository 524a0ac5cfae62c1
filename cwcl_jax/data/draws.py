"""Reproducible random choices from integers alone: the same on every platform and release.

`Draws` is SplitMix64 (Steele, Lea and Flood, 2014) seeded by a hash of integers. Library generators
are either slow to construct for every example or do not guarantee the same stream in later
releases.
"""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    """Returns SplitMix64's finaliser: a bijection of 64-bit integers without visible structure."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def hash_integers(*values: int) -> int:
    """Returns a 64-bit hash of a sequence of integers; order matters."""
    state = 0
    for value in values:
        state = mix((state + _STEP ^ value) & _MASK)
    return state


class Draws:
    """A stream of random choices that is a function of the integers it is made from."""

    __slots__ = ("state",)

    def __init__(self, *key: int):
        self.state = hash_integers(*key)

    def below(self, bound: int) -> int:
        """Returns an integer in [0, bound), uniform up to 2^-64 * bound."""
        self.state = state = (self.state + _STEP) & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        return (state ^ (state >> 31)) * bound >> 64

    def uniform(self, low: float | int = 0, high: float | int = 1) -> float:
        """Returns a float in [low, high) with 32 random bits."""
        return low + (high - low) * (self.below(1 << 32) / (1 << 32))

    def chance(self, share: float | int) -> bool:
        """Returns True with probability `share`."""
        return self.below(1 << 32) < share * (1 << 32)

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of the options, with equal probabilities."""
        return options[self.below(len(options))]
