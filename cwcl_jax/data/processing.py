"""Converts a source's examples to the arrays of the towers, one example or batch at a time."""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.label_sets import labels_of, numbered
from cwcl_jax.data.options import DataConfig, features_name, given_as_features, reads_features
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example
from cwcl_jax.data.views import drawn_input, every_input
from cwcl_jax.modalities import Modality, WrongInputs, stream_of
from cwcl_jax.modalities.base import fitting
from cwcl_jax.modalities.text import usable_captions

Batch = dict[str, Any]
# The field of an example that holds its captions.
_CAPTIONS = "text"
_LABEL_FIELDS = {"class": "label", "text": _CAPTIONS, "sets": "labels"}


class Processor:
    """Converts examples to the inputs of the given towers, according to the options.

    If the source provides features for a tower, they replace its raw inputs.
    """

    def __init__(self, config: DataConfig, towers: Sequence[str], embedded: Sequence[str] = ()):
        self.config = config
        self.towers = tuple(towers)
        self.inputs = {tower: config.inputs_of(tower) for tower in towers}
        self.raw = {
            tower: modality
            for tower, modality in self.inputs.items()
            if not given_as_features(tower, modality, embedded)
        }
        for tower, modality in self.raw.items():
            if reads_features(modality) and not modality.field:
                raise ValueError(
                    f"The source has no features for the tower {tower!r} (it has "
                    f"{', '.join(embedded) or 'none'}): set config.data.{tower}.field to the "
                    "array's name, or add the features in the source line."
                )

    def fields(self) -> set[str]:
        """Returns the fields that must be read of every example."""
        fields = {modality.field for modality in self.raw.values()}
        if self.config.labels:
            fields.add(_LABEL_FIELDS[self.config.labels])
        with_features = self.config.guide or len(self.raw) < len(self.inputs)
        return {*fields, "features"} if with_features else fields

    def fingerprint(self) -> dict[str, Any]:
        """Returns the options that determine the arrays, by tower."""
        made: dict[str, Any] = {
            "inputs": {tower: modality.fingerprint() for tower, modality in self.raw.items()}
        }
        if self.config.labels:
            made["labels"] = self.config.labels
        if self.config.labels == "sets":
            made |= {name: getattr(self.config, name) for name in ("label_separator", "max_labels")}
        if self.config.guide:
            made["guide"] = self.config.guide
        return made

    @property
    def with_lengths(self) -> str:
        """The tower whose batches have one of several lengths; "" if there is none.

        Raises:
          ValueError: there is more than one.
        """
        found = [tower for tower, modality in self.raw.items() if modality.lengths]
        if len(found) > 1:
            raise ValueError(
                f"config.data.{found[0]} and config.data.{found[1]} both set buckets, but batches "
                "can be sorted by the length of only one tower's inputs."
            )
        return found[0] if found else ""

    def train_example(
        self, example: Example, *key: int, length: float | None = None
    ) -> dict[str, Any]:
        """Returns the inputs of one example by tower, before `finish`.

        Random choices depend on the integers `key`, separately for each tower; without a key
        nothing is random. `length` is that of the batch, if it is not the default.
        """
        made: dict[str, Any] = {}
        for tower, modality in self.inputs.items():
            draws = Draws(*key, *stream_of(tower, modality)) if key else None
            if tower not in self.raw:
                made[tower] = {"features": _features(example, tower, modality, draws)}
                continue
            if length is not None and modality.lengths:
                modality = modality.fitting(_field(example, modality.field), length)
            made[tower] = self._prepared(tower, modality, example, draws)
        if self.config.labels:
            made["label"] = self._label(example, made, key)
        if self.config.guide:
            made["guide"] = _named_features(example, self.config.guide)
        return made

    def _prepared(
        self, tower: str, modality: Modality, example: Example, draws: Draws | None = None
    ) -> Any:
        value = _field(example, modality.field)
        try:
            return drawn_input(tower, modality, value, str(example["id"]), draws)
        except WrongInputs as error:
            raise WrongInputs(f"config.data.{tower}: {error}") from error

    def every_input(self, example: Example, tower: str) -> list[Any]:
        """Returns all inputs of a tower from which training draws, evaluation's first.

        They are not processed by `finish` yet.
        """
        modality = self.inputs[tower]
        if tower not in self.raw:
            return [{"features": _features(example, tower, modality)}]
        value = _field(example, modality.field)
        try:
            return every_input(tower, modality, value, str(example["id"]))
        except WrongInputs as error:
            raise WrongInputs(f"config.data.{tower}: {error}") from error

    def _label(
        self, example: Example, made: Mapping[str, Any], key: Sequence[int]
    ) -> np.int32 | np.ndarray:
        """Returns the label, equal for pairs that count as equal; for sets a row of labels."""
        if self.config.labels == "sets":
            name = str(example["id"])
            found = labels_of(_field(example, "labels"), self.config.label_separator, name)
            return numbered(found, self.config.max_labels, name)
        if self.config.labels == "class":
            return _in_32_bits(_field(example, "label"))
        text = self._caption(example, made, key)
        return np.int32(zlib.crc32(text.casefold().encode()) & 0x7FFFFFFF)

    def _caption(self, example: Example, made: Mapping[str, Any], key: Sequence[int]) -> str:
        """Returns the caption that a tower reads or has features of, otherwise the first one."""
        for tower, modality in self.inputs.items():
            if modality.field != _CAPTIONS or reads_features(modality):
                continue
            read = made[tower]
            # prepared here too, so that a feature cache does not change the labels
            if tower not in self.raw:
                draws = Draws(*key, *stream_of(tower, modality)) if key else None
                read = self._prepared(tower, modality, example, draws)
            if isinstance(read, str):
                return read
        return usable_captions(_field(example, _CAPTIONS))[0]

    def eval_example(self, example: Example) -> dict[str, Any]:
        """Returns the same as `train_example`, without any randomness."""
        return {
            tower: self._prepared(tower, modality, example)
            if tower in self.raw
            else {"features": _features(example, tower, modality)}
            for tower, modality in self.inputs.items()
        }

    def lost(self, example: Example) -> dict[str, tuple[str, ...]]:
        """Returns what the inputs lack of an example, by tower (see `Modality.lost`)."""
        return {
            tower: modality.lost(_field(example, modality.field))
            for tower, modality in self.raw.items()
        }

    def finish(self, examples: Sequence[dict[str, Any]]) -> None:
        """Finishes in place what is computed for several examples in one call, such as tokens."""
        for tower, modality in self.raw.items() if examples else ():
            finished = modality.finish([example[tower] for example in examples])
            for example, arrays in zip(examples, finished, strict=True):
                try:
                    example[tower] = fitting(modality, arrays)
                except WrongInputs as error:
                    raise WrongInputs(f"config.data.{tower}: {error}") from error


def collect(examples: Sequence[Any]) -> Any:
    """Returns the dicts of several examples as one dict of lists."""
    if isinstance(examples[0], Mapping):
        return {name: collect([example[name] for example in examples]) for name in examples[0]}
    return list(examples)


def join(parts: Sequence[Any]) -> Any:
    """Returns one batch from several parts; lists of arrays in them are copied only once."""
    if isinstance(parts[0], Mapping):
        return {name: join([part[name] for part in parts]) for name in parts[0]}
    if all(isinstance(part, list) for part in parts):
        return np.stack(list(itertools.chain.from_iterable(parts)))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _field(example: Example, name: str) -> Any:
    value = example.get(name)
    if value is None:
        raise BadExample(
            f"{name} missing",
            f"the example has only {', '.join(example)}; set config.data.<tower>.field to the "
            "field that the tower reads",
        )
    return value


def _in_32_bits(label: int) -> np.int32:
    """Returns the label, or a hash of it if it does not fit into 32 bits."""
    small = -(1 << 31) <= label < 1 << 31
    return np.int32(label if small else zlib.crc32(str(int(label)).encode()) & 0x7FFFFFFF)


def _features(
    example: Example, tower: str, modality: Modality, draws: Draws | None = None
) -> np.ndarray:
    """Returns the features of the input that `drawn_input` would draw."""
    name = features_name(tower, modality)
    several = (example.get("variants") or {}).get(name)
    if several is None or draws is None:
        return _named_features(example, name)
    return several[draws.below(len(several))]


def _named_features(example: Example, name: str) -> np.ndarray:
    vectors = example.get("features") or {}
    if name not in vectors:
        raise BadExample("features missing", f"no vector for {name!r}")
    return vectors[name]
