"""Examines a sample of the training data before a run: what the towers would lose of it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cwcl_jax.data.label_sets import labels_of
from cwcl_jax.data.skipping import ALWAYS_ALLOWED, BadExample, summary
from cwcl_jax.data.sources import Source
from cwcl_jax.modalities import Modality

_LOOKED_AT = 256


@dataclass(frozen=True)
class Loss:
    """Some of the sampled examples are incomplete for a tower, or cannot be read at all."""

    tower: str
    remark: str
    count: int
    of: int
    unreadable: bool = False

    @property
    def share(self) -> float:
        return self.count / self.of

    def __str__(self) -> str:
        return f"{self.count} of {self.of} {self.tower} inputs are {self.remark}"


@dataclass(frozen=True)
class LabelSets:
    """Statistics of the sets of labels in a sample.

    Attributes:
      kinds: number of different labels.
      counts: number of labels of each example.
      example: the labels of one example.
    """

    kinds: int
    counts: Sequence[int]
    example: str

    def __str__(self) -> str:
        without = sum(not count for count in self.counts)
        return (
            f"{np.mean(self.counts):.1f} labels per example in a sample of {len(self.counts)}, "
            f"{self.kinds} different ones, {without} examples without any; for example: "
            f"{self.example}"
        )


def survey_labels(source: Source, separator: str) -> LabelSets:
    """Returns statistics of the label sets in a sample spread evenly over the source."""
    sets = []
    for index in _sample(source):
        try:
            value = source.read(index, ("labels",)).get("labels")
            sets.append(labels_of(value, separator))
        except BadExample:
            continue
    example = max(sets, key=len, default=[])
    kinds = {label for found in sets for label in found}
    return LabelSets(len(kinds), [len(found) for found in sets], " | ".join(example))


def shape_of_features(source: Source, name: str) -> tuple[int, ...]:
    """Returns the shape of the features `name` of one example.

    Raises:
      ValueError: no example of a sample has any.
    """
    for index in _sample(source):
        try:
            return source.read(index, ("features",))["features"][name].shape
        except BadExample:
            continue
    raise ValueError(f"no example of a sample has usable features {name!r}")


def _sample(source: Source) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).astype(int)).tolist()


def survey(source: Source, inputs: Mapping[str, Modality]) -> list[Loss]:
    """Returns what `inputs` lose of raw values, in a sample spread evenly over the source.

    Args:
      source: the examples. Those that cannot be read are a loss of their own.
      inputs: the inputs of towers that read raw values, by name.
    """
    counts, unreadable = ({tower: Counter[str]() for tower in inputs} for _ in range(2))
    looked_at = Counter[str]()
    for index in _sample(source):
        for tower, modality in inputs.items():
            try:
                value = source.read(index, (modality.field,)).get(modality.field)
                says = value is not None and _says_something(modality)
                remarks = _remarks(modality, value) if says else ()
            except BadExample as error:
                unreadable[tower][error.kind] += 1
                continue
            looked_at[tower] += value is not None
            counts[tower].update(remarks)
    losses = [
        Loss(tower, remark, count, looked_at[tower])
        for tower, remarks in counts.items()
        for remark, count in remarks.items()
    ]
    return losses + [
        Loss(
            tower, f"unusable ({summary(kinds)})", kinds.total(),
            looked_at[tower] + kinds.total(), unreadable=True,
        )
        for tower, kinds in unreadable.items()
        if kinds
    ]  # fmt: skip


def _says_something(modality: Modality) -> bool:
    kind = type(modality)
    return kind.lost is not Modality.lost or kind.remarks is not Modality.remarks


def _remarks(modality: Modality, value: Any) -> list[str]:
    """Returns all remarks on a raw value and its arrays."""
    found = list(modality.lost(value))
    if type(modality).remarks is not Modality.remarks:
        (arrays,) = modality.finish([modality.prepare(value)])
        rows = {name: np.asarray(array)[None] for name, array in arrays.items()}
        found += [remark for remark, marked in modality.remarks(rows).items() if marked.any()]
    return found


def too_much(losses: Collection[Loss], limit: float) -> Loss | None:
    """Returns the first loss that affects more than `limit` of the examples, or None."""
    return next((loss for loss in losses if not loss.unreadable and loss.share > limit), None)


def too_few(losses: Collection[Loss], limit: float) -> Loss | None:
    """Returns the first loss by which far more than `limit` of the examples are unusable, or None.

    Twice the limit, because a sample can have more of them than the data; a run counts exactly.
    """
    for loss in losses:
        if loss.unreadable and loss.count > max(ALWAYS_ALLOWED, 2 * limit * loss.of):
            return loss
    return None
