"""Batches of m groups with k examples of each; with k = 1 no two examples of a group.

A pack is k examples of one group, and every batch contains m packs of different groups. The packs
are put in a sequence, those of a group next to each other and the groups in a new random order
every epoch. The sequence is dealt to the T batches like cards: pack q goes to batch q mod T in
round q // T. A group has at most T packs, so two of them never meet. Only a group that extends over
the end of a round must keep its place. All others are shuffled within their round, so that chance
decides which groups meet. Memory and time depend on the number of groups with several packs: the
groups with one pack are computed where they are needed (`order.permute`).
"""

import functools
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, Shaped

from cwcl_jax.data.composers.base import ComposerError, Composition, digest
from cwcl_jax.data.order import permute, permute_each
from cwcl_jax.data.sources.base import Source

# Separates these random streams from those of the plain order.
_SLOTS, _BATCHES, _ROUND, _SINGLES, _MEMBERS = 81, 82, 83, 84, 85
_OF_THE_GROUP = 8
_BLOCK = 1 << 20


def compose_groups(
    column: str, *, k: int = 1, source: Source, batch_size: int, seed: int
) -> "Groups":
    """Returns the batches of `groups:COLUMN?k=2`: k examples of each of batch_size / k groups.

    Raises:
      ComposerError: the column does not exist or has gaps, or there are too few groups.
    """
    if not column:
        raise ComposerError(
            "groups: names no column; write groups:COLUMN, for example groups:speaker?k=2"
        )
    try:
        numbers = group_numbers(source.column(column), column, source)
    except ComposerError:
        raise
    except ValueError as error:
        raise ComposerError(str(error)) from error
    return Groups(numbers, k=k, batch_size=batch_size, seed=seed, column=column)


def group_numbers(
    values: Shaped[np.ndarray, " n"], column: str, source: Source
) -> Shaped[np.ndarray, " n"]:
    """Returns the values of a column as integers that are equal if the values are equal.

    Raises:
      ComposerError: an example has no value, or one that cannot be compared.
    """
    if values.dtype.kind in "iu":
        # -1 means "none" in pandas' cat.codes and factorize, and in clusterings.
        missing = values < 0 if values.dtype.kind == "i" else np.zeros(len(values), bool)
        numbers = values
    elif values.dtype.kind in "fb":
        missing = np.isnan(values.astype(np.float64))
        numbers = np.unique(values, return_inverse=True)[1]
    else:
        known: dict[Hashable, int] = {}
        try:
            found = (known.setdefault(_value(v), len(known)) for v in values.tolist())
            numbers = np.fromiter(found, np.int64, len(values))
        except TypeError as error:
            raise ComposerError(
                f"the column {column!r} holds lists or dicts; a group is one text or number per "
                "example"
            ) from error
        missing = numbers == known.get(None, -1)
    if missing.any():
        first = int(np.argmax(missing))
        name = source.read(first, ())["id"]
        raise ComposerError(
            f"{int(missing.sum())} of {len(values)} examples have no value in the column "
            f"{column!r}, the first is example {first} ({name}), row {first + 1} of the data: fill "
            "them in, or leave these rows out" + _remark(values)
        )
    return numbers


def _remark(values: np.ndarray) -> str:
    return " (negative numbers count as missing)" if values.dtype.kind == "i" else ""


def _value(value: Any) -> Hashable:
    """Returns a value in the form in which it is compared; None for a missing one."""
    if isinstance(value, str):
        return value.strip() or None
    return None if value is None or value != value else value


class _Layout(NamedTuple):
    """Places of the groups with several packs in an epoch, and the free places of each round.

    Attributes:
      groups: these groups in the epoch's order.
      begins, ends: places of their packs.
      before: number of such packs before each group; one more entry than groups.
      first, last: by round, the batches between which packs can be shuffled.
    """

    groups: Int64[np.ndarray, " g"]
    begins: Int64[np.ndarray, " g"]
    ends: Int64[np.ndarray, " g"]
    before: Int64[np.ndarray, " starts"]
    first: Int64[np.ndarray, " m"]
    last: Int64[np.ndarray, " m"]


class Groups(Composition):
    """The batches of groups; see the module's docstring.

    Replacements of an unusable example are other examples of its group, then examples of groups
    that are not in the batch. Two replacements can be of one group only if two examples of a batch
    are unusable and both of their groups are used up.

    Args:
      numbers: group of every example, any integers.
      k: number of examples of each group in a batch.
      column: name of the column that holds the groups, for messages.
    """

    def __init__(
        self,
        numbers: Shaped[np.ndarray, " n"],
        *,
        k: int,
        batch_size: int,
        seed: int,
        column: str = "groups",
    ):
        if k < 1:
            raise ComposerError(f"k={k} must be at least 1: the examples of a group in a batch")
        if batch_size % k:
            raise ComposerError(
                f"k={k} examples of each group do not fill a batch of {batch_size}: choose a k "
                "that divides it"
            )
        self._k, self._per_batch, self._seed = k, batch_size // k, seed
        self._members, self._starts = _by_group(numbers)
        sizes = np.diff(self._starts)
        packs = sizes // k
        self.steps = _most_steps(packs, self._per_batch)
        self._check(sizes, column, batch_size)
        packs = np.minimum(packs, self.steps)
        small = int(sizes[packs == 0].sum())
        self.left_out = {
            f"in groups of fewer than {k}, in every epoch": small,
            f"beyond a multiple of {k} in their group": int((sizes % k).sum()) - small,
            "in groups of more than there are batches": int((sizes // k - packs).sum()) * k,
        }
        each = "never two of one" if k == 1 else f"{k} of each of {self._per_batch}"
        self.told = f"groups by {column!r}, {each}; {len(sizes)} groups of {_range(sizes)} examples"
        self._several = np.flatnonzero(packs > 1)
        self._packs = packs[self._several].astype(np.int64)
        self._single = np.flatnonzero(packs == 1).astype(self._members.dtype)
        # Two epochs, because threads read ahead beyond the end of one.
        self._layout = functools.lru_cache(2)(self._make_layout)
        self._composed = functools.lru_cache(16)(self._compose)

    def _check(self, sizes: Integer[np.ndarray, " g"], column: str, batch_size: int) -> None:
        usable = int((sizes >= self._k).sum())
        if usable >= self._per_batch:
            return
        fitting = [
            k
            for k in range(1, batch_size + 1)
            if batch_size % k == 0 and int((sizes >= k).sum()) >= batch_size // k
        ]
        others = f", or set k to one of {fitting}" if fitting else ""
        raise ComposerError(
            f"a batch of {batch_size} with {self._k} examples of each group takes "
            f"{self._per_batch} groups, but {column!r} has {usable} of at least {self._k}: "
            f"lower config.global_batch_size{others}"
        )

    def _make_layout(self, epoch: int) -> _Layout:
        count, rounds, steps = len(self._several), self._per_batch, self.steps
        slots = np.empty(count, np.int64)
        for start in range(0, count, _BLOCK):  # blocks fit into the processor's cache
            some = np.arange(start, min(count, start + _BLOCK))
            total = count + len(self._single)
            slots[some] = permute(some, total, self._seed, _SLOTS, epoch)
        order = np.argsort(slots)
        groups, packs = self._several[order], self._packs[order]
        # A group in slot s follows s others; those with several packs take more places.
        ends = slots[order] + 1 + np.cumsum(packs - 1)
        begins = ends - packs
        before = np.concatenate([[0], np.cumsum(packs)])
        cuts = np.arange(1, rounds) * steps
        cut = np.searchsorted(begins, cuts) - 1
        inside = cut >= 0
        behind, ahead = np.zeros_like(cuts), np.zeros_like(cuts)
        behind[inside] = np.maximum(ends[cut[inside]] - cuts[inside], 0)
        ahead[inside] = np.where(behind[inside] > 0, cuts[inside] - begins[cut[inside]], 0)
        first = np.concatenate([[0], behind])
        last = steps - np.concatenate([ahead, [0]])
        return _Layout(groups, begins, ends, before, first, last)

    def _compose(
        self, epoch: int, step: int
    ) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"], Int64[np.ndarray, "m k"]]:
        """Returns the groups of a batch, the pack of each, and their examples."""
        layout, seed = self._layout(epoch), self._seed
        rounds = np.arange(self._per_batch)
        dealt = int(permute(np.array([step]), self.steps, seed, _BATCHES, epoch)[0])
        first, last = layout.first, layout.last
        free = np.flatnonzero((dealt >= first) & (dealt < last))
        places = np.full(self._per_batch, dealt)
        places[free] = first[free] + permute_each(
            dealt - first[free], (last - first)[free], rounds[free], seed, _ROUND, epoch
        )
        places += rounds * self.steps
        groups, packs = np.empty_like(places), np.zeros_like(places)
        near = np.searchsorted(layout.begins, places, side="right") - 1
        among = np.zeros(len(places), bool)
        if len(layout.ends):
            among = (near >= 0) & (places < layout.ends[near])
        groups[among] = layout.groups[near[among]]
        packs[among] = places[among] - layout.begins[near[among]]
        ranks = (places - layout.before[near + 1])[~among]
        if ranks.size:
            total = len(self._single)
            groups[~among] = self._single[permute(ranks, total, seed, _SINGLES, epoch)]
        return groups, packs, self._examples(epoch, groups, packs)

    def _examples(
        self, epoch: int, groups: Int64[np.ndarray, " m"], packs: Int64[np.ndarray, " m"]
    ) -> Int64[np.ndarray, "m k"]:
        ranks = packs[:, None] * self._k + np.arange(self._k)
        each = np.repeat(groups, self._k)
        return self._member(epoch, each, ranks.ravel()).reshape(ranks.shape)

    def _member(
        self, epoch: int, groups: Int64[np.ndarray, " n"], ranks: Int64[np.ndarray, " n"]
    ) -> Int64[np.ndarray, " n"]:
        """Returns the examples at `ranks` of the epoch's order within each of `groups`."""
        starts = self._starts[groups].astype(np.int64)
        sizes = self._starts[groups + 1] - starts
        places = permute_each(ranks, sizes, groups, self._seed, _MEMBERS, epoch)
        return self._members[starts + places].astype(np.int64)

    def batch(self, epoch: int, step: int) -> Int64[np.ndarray, " b"]:
        return self._composed(epoch, step)[2].ravel()

    def replacements(self, epoch: int, step: int, row: int) -> Iterator[int]:
        groups, packs, _ = self._composed(epoch, step)
        place, rank = divmod(row, self._k)
        group = int(groups[place])
        size = int(self._starts[group + 1] - self._starts[group])
        # Other examples of the group, in no row of this pack and not the replacement of another
        # row.
        for far in range(rank, min(size - self._k, _OF_THE_GROUP * self._k), self._k):
            behind = (int(packs[place]) * self._k + self._k + far) % size
            yield int(self._member(epoch, np.array([group]), np.array([behind]))[0])
        here = set(groups.tolist())
        for other in self.others(epoch, step):
            of, _, examples = self._composed(*other)
            if int(of[place]) not in here:
                yield int(examples[place, rank])

    def fingerprint(self) -> str:
        return digest(self._members, self._starts)


def _by_group(
    numbers: Shaped[np.ndarray, " n"],
) -> tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " starts"]]:
    """Returns the example numbers sorted by group, and the start of each group."""
    narrow = np.int32 if len(numbers) < 1 << 31 else np.int64
    members = np.argsort(numbers, kind="stable").astype(narrow)
    inorder = numbers[members]
    begins = np.flatnonzero(inorder[1:] != inorder[:-1]) + 1
    starts = np.empty(len(begins) + 2, narrow)
    starts[0], starts[1:-1], starts[-1] = 0, begins, len(numbers)
    return members, starts


def _most_steps(packs: Integer[np.ndarray, " g"], per_batch: int) -> int:
    """Returns the maximal number of batches such that no batch gets two packs of a group."""
    sizes, counts = np.unique(packs, return_counts=True)
    low, high = 0, int(packs.sum()) // per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if (np.minimum(sizes, middle) * counts).sum() >= per_batch * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _range(sizes: Integer[np.ndarray, " g"]) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return str(low) if low == high else f"{low} to {high}"
