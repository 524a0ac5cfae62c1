"""Batches of a whole source in order, for evaluation: nothing is random, nothing is replaced."""

import logging
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.processing import Batch, Processor, collect, join
from cwcl_jax.data.reader import ChunkedReader
from cwcl_jax.data.skipping import BadExample, SkipCounter
from cwcl_jax.data.sources import Source, open_source

_LOG = logging.getLogger(__name__)
# Fields of an example that tasks may read in addition to its inputs.
_BESIDE = ("text", "label")


class EvalBatches:
    """All examples of a source in order, the last batch padded; iterate as often as needed.

    Every pass counts its unusable examples again, each of them once; `skipped` belongs to the last
    pass.

    In addition to the inputs, a batch has "index", "valid" (False for padding and for unusable
    examples, whose inputs repeat another example), "id", "lost" (what the inputs lack, by tower),
    and further fields of the source: "label" (-1 if none can be read) and "captions" (lists of
    strings, possibly empty).
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        towers: Sequence[str],
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} is not divisible by {process_count} hosts.")
        self.source = source
        self._processor = Processor(config, towers, source.embedded)
        self._fields = self._processor.fields()
        self._told = threading.Event()
        self._size = batch_size
        self._local = batch_size // process_count
        self._first_row = process_index * self._local
        self._config = config
        self._counter = SkipCounter(config.max_skipped_share)

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self._size)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of unusable examples by kind, in the pass that was started last."""
        return self._counter.kinds

    def __iter__(self) -> Iterator[Batch]:
        self._counter = counter = SkipCounter(self._config.max_skipped_share)
        reader = ChunkedReader(
            partial(self._load, counter),
            local_size=self._local,
            steps=len(self),
            config=self._config,
        )
        reader.start(0)
        try:
            for _ in range(len(self)):
                yield self._fill([row for chunk in reader.next_chunks() for row in chunk])
        finally:
            reader.close()

    def _load(
        self, counter: SkipCounter, step: int, rows: np.ndarray
    ) -> list[tuple[int, Any, Any]]:
        """Returns number, inputs (None if unusable) and example of some rows of a batch."""
        indices = step * self._size + self._first_row + rows
        loaded = [self._load_one(int(index), counter) for index in indices]
        self._processor.finish([inputs for _, inputs, _ in loaded if inputs is not None])
        return loaded

    def _load_one(self, index: int, counter: SkipCounter) -> tuple[int, Any, Any]:
        if index >= len(self.source):
            return index, None, {}
        example: dict[str, Any] = {}
        try:
            example = self._read(index)
            inputs = self._processor.eval_example(example)
            example["lost"] = self._processor.lost(example)
        except BadExample as error:
            counter.add_skipped(f"example {index} ({example.get('id', '?')})", error)
            return index, None, example
        counter.add_read(1)
        return index, inputs, example

    def _read(self, index: int) -> dict[str, Any]:
        """Returns the example with captions and label, if these can be read.

        Raises:
          BadExample: a field that the inputs need cannot be read.
        """
        with suppress(BadExample):
            return self.source.read(index, {*self._fields, *_BESIDE})
        example = self.source.read(index, self._fields)
        for field in _BESIDE:
            try:
                example |= self.source.read(index, (field,))
            except BadExample as error:
                if not self._told.is_set():
                    self._told.set()
                    _LOG.warning(
                        "Example %d (%s) is used without its %s: %s (further ones are not logged)",
                        index, example["id"], field, error,
                    )  # fmt: skip
        return example

    def _fill(self, rows: Sequence[tuple[int, Any, Any]]) -> Batch:
        """Returns one batch of the rows; unusable ones repeat the inputs of a usable example."""
        some = next((inputs for _, inputs, _ in rows if inputs is not None), None)
        if some is None:
            some = self._any_usable()
        batch: Batch = join([collect([inputs or some for _, inputs, _ in rows])])
        batch["captions"] = [_captions(example.get("text")) for _, _, example in rows]
        batch["index"] = np.array([index for index, _, _ in rows], np.int64)
        batch["valid"] = np.array([inputs is not None for _, inputs, _ in rows])
        labels = [example.get("label", -1) for _, _, example in rows]
        batch["label"] = np.array(labels, np.int64)
        batch["lost"] = [example.get("lost", {}) for _, _, example in rows]
        batch["id"] = [example.get("id", "") for _, _, example in rows]
        return batch

    def _any_usable(self) -> dict[str, Any]:
        """Returns the inputs of the first usable example, to fill a block that has none.

        This search does not change the pass's counts. It has a counter of its own, with the same
        limit of unusable examples.

        Raises:
          ValueError: no example is usable.
        """
        counter = SkipCounter(self._config.max_skipped_share)
        for index in range(len(self.source)):
            inputs = self._load_one(index, counter)[1]
            if inputs is not None:
                self._processor.finish([inputs])
                return inputs
        raise ValueError(f"No example of the source is usable: {dict(self.skipped)}.")


def _captions(value: str | Sequence[str] | None) -> list[str]:
    """Returns all captions that are not blank, possibly none."""
    options = [value] if isinstance(value, str) else value or []
    return [text.strip() for text in options if text and text.strip()]


def eval_batches(
    source: Source | str,
    config: DataConfig,
    towers: Sequence[str],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Returns batches of a whole source (or source line) in order, without any randomness."""
    opened = open_source(source, cache_dir=config.cache_dir) if isinstance(source, str) else source
    return EvalBatches(
        opened,
        config,
        towers,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
