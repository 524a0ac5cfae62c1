"""All inputs of one tower, example by example, from which a feature cache is made."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.processing import Processor
from cwcl_jax.data.reader import ChunkedReader
from cwcl_jax.data.skipping import BadExample, SkipCounter
from cwcl_jax.data.sources import Example, Source


@dataclass(frozen=True)
class ExampleInputs:
    """The inputs of one example for a tower.

    Attributes:
      id: id of the example.
      inputs: arrays by name, evaluation's input first; [] if the example is unusable.
      told: remarks for users, each completing "12 of the examples are ...".
    """

    id: str
    inputs: list[dict[str, np.ndarray]]
    told: tuple[str, ...] = ()


class EveryInput:
    """The inputs of all examples of a source in order; iterate as often as needed.

    Args:
      every: whether to yield all inputs that training draws from, or only evaluation's.
      batch_size: number of examples that are read ahead.
    """

    def __init__(
        self, source: Source, config: DataConfig, tower: str, *, every: bool, batch_size: int
    ):
        self._source, self._config, self._tower = source, config, tower
        self._every, self._size = every, batch_size
        self._processor = Processor(config, (tower,), source.embedded)
        self._counter = SkipCounter(config.max_skipped_share)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of unusable examples by kind, in the pass that was started last."""
        return self._counter.kinds

    def __iter__(self) -> Iterator[ExampleInputs]:
        self._counter = SkipCounter(self._config.max_skipped_share)
        steps = math.ceil(len(self._source) / self._size)
        reader = ChunkedReader(self._load, local_size=self._size, steps=steps, config=self._config)
        reader.start(0)
        try:
            for _ in range(steps):
                for chunk in reader.next_chunks():
                    yield from chunk
        finally:
            reader.close()

    def _load(self, step: int, rows: np.ndarray) -> list[ExampleInputs]:
        indices = step * self._size + rows
        made = [self._load_one(int(i)) for i in indices[indices < len(self._source)]]
        self._processor.finish([inputs for _, every, _ in made for inputs in every])
        rows_of = [[inputs[self._tower] for inputs in every] for _, every, _ in made]
        return [
            ExampleInputs(name, arrays, (*told, *self._remarks(arrays)))
            for (name, _, told), arrays in zip(made, rows_of, strict=True)
        ]

    def _load_one(self, index: int) -> tuple[str, list[dict[str, Any]], tuple[str, ...]]:
        """Returns id, inputs by tower (before `finish`) and remarks of an example."""
        processor, name = self._processor, ""
        try:
            example = self._source.read(index, processor.fields())
            name = str(example["id"])
            if self._every:
                inputs = processor.every_input(example, self._tower)
            else:
                inputs = [processor.eval_example(example)[self._tower]]
            told = tuple(dict.fromkeys(self._told(example)))
        except BadExample as error:
            self._counter.add_skipped(f"example {index} ({name or '?'})", error)
            with suppress(BadExample):
                name = str(self._source.read(index, ())["id"])
            return name, [], ()
        self._counter.add_read(1)
        return name, [{self._tower: value} for value in inputs], told

    def _told(self, example: Example) -> Iterator[str]:
        """Yields what the inputs lack of the variants, and whether variants were left out."""
        modality = self._processor.raw.get(self._tower)
        if modality is None:
            return
        variants = modality.variants(example[modality.field])
        for variant in variants if self._every else variants[:1]:
            yield from modality.lost(variant)
        if not self._every and len(variants) > 1 and len(set(map(str, variants))) > 1:
            yield "with several variants (captions), of which the first is embedded"

    def _remarks(self, arrays: list[dict[str, np.ndarray]]) -> list[str]:
        """Returns the modality's remarks on evaluation's input."""
        modality = self._processor.raw.get(self._tower)
        if modality is None or not arrays:
            return []
        rows = {name: np.asarray(array)[None] for name, array in arrays[0].items()}
        return [remark for remark, marked in modality.remarks(rows).items() if marked.any()]
