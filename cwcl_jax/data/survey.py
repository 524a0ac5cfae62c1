"""Examines a sample of the training data before a run: what the towers would lose of it."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cwcl_jax.data.label_sets import labels_of
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import Source
from cwcl_jax.modalities import Modality

_LOOKED_AT = 256


@dataclass(frozen=True)
class Loss:
    """Some of the sampled examples are incomplete for a tower."""

    tower: str
    remark: str
    count: int
    of: int

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
      source: the examples; unusable ones are left out.
      inputs: the inputs of towers that read raw values, by name.
    """
    losers = {tower: m for tower, m in inputs.items() if _says_something(m)}
    counts: dict[str, Counter[str]] = {tower: Counter() for tower in losers}
    looked_at = Counter[str]()
    for index in _sample(source):
        for tower, modality in losers.items():
            try:
                value = source.read(index, (modality.field,)).get(modality.field)
                remarks = () if value is None else _remarks(modality, value)
            except BadExample:
                continue
            looked_at[tower] += value is not None
            counts[tower].update(remarks)
    return [
        Loss(tower, remark, count, looked_at[tower])
        for tower, remarks in counts.items()
        for remark, count in remarks.items()
    ]


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
    return next((loss for loss in losses if loss.share > limit), None)
