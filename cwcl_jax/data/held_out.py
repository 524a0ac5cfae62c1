"""A seeded share of the training examples that is never trained on.

The choice depends only on the seed and the source, not on hosts, threads or the step. The remaining
examples keep the source's order. Of millions of examples, only the numbers of the held-out ones are
kept in memory (8 bytes each).
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from cwcl_jax.data.order import permute
from cwcl_jax.data.overlap import same_content
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Mixture, Source
from cwcl_jax.data.sources.base import Example, SourceAround, fingerprint_of

# Separates this random stream from those of the order.
_STREAM = 71
_LOOKED_AT, _NEIGHBOURS = 64, 2


def hold_out(source: Source, share: float, seed: int) -> tuple[Source, Source]:
    """Returns the source split into a training part and a held-out part.

    Each part of a mixture is split, so that both sides have the mixture's shares.

    Args:
      share: fraction of the examples of each part that is held out, between 0 and 1.

    Raises:
      ValueError: nothing would be left on one of the sides.
    """
    if source.parts:
        pairs = [hold_out(part, share, seed) for part in source.parts]
        trained_on, held_out = ([pair[i] for pair in pairs] for i in (0, 1))
        return Mixture(trained_on, source.weights), Mixture(held_out, source.weights)
    length = len(source)
    count = round(share * length)
    if not 0 < count < length:
        raise ValueError(
            f"validation_share={share} of {length} examples holds out {count}: choose a "
            f"{'smaller' if count else 'larger'} share, or set validation to a separate source"
        )
    held = np.sort(permute(np.arange(count), length, seed, _STREAM))
    # The j-th of the kept examples is j + k if k held-out ones precede it.
    before = held - np.arange(count)

    def kept(places: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        return places + np.searchsorted(before, places, side="right")

    name = (share, seed)
    return (
        Part(source, kept, length - count, ("kept", *name)),
        Part(source, lambda places: held[places], count, ("held out", *name)),
    )


class Part(SourceAround):
    """Examples of `source`; `number_of` maps numbers here to numbers there."""

    def __init__(
        self,
        source: Source,
        number_of: Callable[[np.ndarray], np.ndarray],
        length: int,
        name: tuple[Any, ...],
    ):
        super().__init__(source)
        self.number_of = number_of
        self._length = length
        self._name = name

    @property
    def durations(self) -> np.ndarray | None:
        whole = self.source.durations
        return None if whole is None else whole[self.number_of(np.arange(self._length))]

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)[self.number_of(np.arange(self._length))]

    def __len__(self) -> int:
        return self._length

    def read(self, index: int, fields: Collection[str]) -> Example:
        return self.source.read(int(self.number_of(np.array([index]))[0]), fields)

    def vectors(self, indices: np.ndarray) -> Mapping[str, np.ndarray] | None:
        return self.source.vectors(self.number_of(np.asarray(indices, np.int64)))

    def fingerprint(self) -> str:
        return fingerprint_of(*self._name, self.source.fingerprint())


def shared_with_neighbours(held: Source, fields: Collection[str]) -> str:
    """Returns a note on how many held-out examples equal a neighbour in the source; "" for none.

    In most tables, the rows of one picture with several captions are neighbours.

    Args:
      held: the second source of `hold_out`.
      fields: fields of which one must be equal, such as "image"; equal captions may be legitimate.
    """
    parts = [part for part in held.parts or (held,) if isinstance(part, Part)]
    found = looked_at = 0
    for part in parts:
        places = np.linspace(0, len(part) - 1, min(len(part), _LOOKED_AT)).astype(int)
        out = {*part.number_of(np.arange(len(part))).tolist()}
        for number in part.number_of(np.unique(places)).tolist() if fields else ():
            looked_at += 1
            near = range(number - _NEIGHBOURS, number + _NEIGHBOURS + 1)
            others = [n for n in near if 0 <= n < len(part.source) and n not in out]
            found += any(_alike(part.source, number, other, fields) for other in others)
    if not found:
        return ""
    return (
        f"{found} of {looked_at} validation examples have the same {' or '.join(sorted(fields))} "
        "as a training example next to them, so their loss is not a held-out loss. Set "
        "config.data.validation to a source of other examples"
    )


def _alike(source: Source, one: int, other: int, fields: Collection[str]) -> bool:
    try:
        first, second = source.read(one, fields), source.read(other, fields)
    except BadExample:
        return False
    return any(same_content(first, second, {field}) for field in fields)
