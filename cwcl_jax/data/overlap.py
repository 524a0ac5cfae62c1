"""Detects examples that two sources share, so that nobody trains on test data."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, Source

# Reading an id may read a row of a file, and a sample of the ids reveals a large overlap.
_LOOKED_FOR, _SEARCHED = 512, 20_000
_COMPARED = 8


def shared_examples(train: Source, other: Source, fields: Collection[str]) -> str:
    """Returns a note on which examples of `other` are in the training data; "" if none were found.

    Sources with the same fingerprint are equal. Otherwise examples with the same id are compared by
    content.

    Args:
      train: the training data.
      other: the data of an evaluation.
      fields: fields of two examples that must be equal, such as "image".
    """
    known = set(_fingerprints(train))
    if known & set(_fingerprints(other)):
        return "its source is (a part of) the training data"
    places = {name: index for index, name in _ids(train, _SEARCHED)}
    looked_for = list(_ids(other, _LOOKED_FOR))
    found = [(places[name], index) for index, name in looked_for if name in places]
    same = next((pair for pair in found[:_COMPARED] if _same(train, other, pair, fields)), None)
    if same is None:
        return ""
    name = other.read(same[1], ())["id"]
    return f"some of its examples are among the training data, such as {name}"


def _fingerprints(source: Source) -> Iterator[str]:
    yield source.fingerprint()
    inner = getattr(source, "source", None)
    if isinstance(inner, Source) and len(inner) == len(source):
        yield from _fingerprints(inner)
        return
    for part in source.parts:
        yield from _fingerprints(part)


def _ids(source: Source, limit: int) -> Iterator[tuple[int, str]]:
    for index in np.unique(np.linspace(0, len(source) - 1, limit).astype(int)):
        try:
            yield int(index), source.read(int(index), ())["id"]
        except BadExample:
            continue


def _same(train: Source, other: Source, pair: tuple[int, int], fields: Collection[str]) -> bool:
    try:
        one, two = train.read(pair[0], fields), other.read(pair[1], fields)
    except BadExample:
        return False
    return same_content(one, two, fields)


def same_content(one: Example, two: Example, fields: Collection[str]) -> bool:
    """Returns whether two examples are equal in those fields that both have, at least one."""
    present = [field for field in fields if field in one and field in two]
    return bool(present) and all(_equal(one[field], two[field]) for field in present)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, (str, bytes)) or isinstance(two, (str, bytes)):
        return one == two
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) == len(two) and all(map(_equal, one, two))
    first, second = np.asarray(one), np.asarray(two)
    return first.shape == second.shape and bool((first == second).all())
