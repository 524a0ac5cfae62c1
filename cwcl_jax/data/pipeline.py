"""Batches for training and evaluation, read by grain's threads in one global order.

Training: batch `step` holds the positions `step * B ... (step + 1) * B` of the order, host h the
h-th block of them. The state is therefore the number of the next step and nothing else: it is
exact, and the same order continues on another number of hosts. Unusable examples are replaced by
others that the order itself names, so every host always makes the same number of steps.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.order import order_of_source
from cwcl_jax.data.processing import Processor
from cwcl_jax.data.skipping import BadExample, SkipCounter
from cwcl_jax.data.sources import Source, open_source

Batch = dict[str, Any]
# Positions that one reader thread prepares in one go: enough to hide the cost of handing over,
# few enough that the threads share the first batch.
_CHUNK = 16
_MAX_REPLACEMENTS = 200
_ENDLESS = 1 << 53


def reader_threads(asked: int) -> int:
    """The number of reader threads: as asked, or the cores this process may use, at most 16."""
    if asked:
        return asked
    usable = getattr(os, "sched_getaffinity", None)
    return min(16, len(usable(0)) if usable else os.cpu_count() or 1)


class _ChunkedReader:
    """Batches of `local_size` rows out of chunks that grain's threads load in order."""

    def __init__(
        self,
        load: Callable[[int, np.ndarray], Batch],
        *,
        local_size: int,
        steps: int,
        config: DataConfig,
    ):
        self._rows = max(d for d in range(1, min(_CHUNK, local_size) + 1) if local_size % d == 0)
        self._per_batch = local_size // self._rows
        threads = reader_threads(config.threads)
        ahead = max(threads, self._per_batch * max(1, config.prefetch))

        def load_chunk(number: int) -> Batch:
            if not self._open:  # What was asked for before the close needs no more work.
                return {}
            step, chunk = divmod(int(number), self._per_batch)
            return load(step, np.arange(chunk * self._rows, (chunk + 1) * self._rows))

        chunks = grain.MapDataset.range(steps * self._per_batch).map(load_chunk)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._dataset = chunks.to_iter_dataset(options)
        self._iterator: Any = None
        self._open = False

    def start(self, step: int) -> None:
        self.close()
        self._open = True
        self._iterator = iter(self._dataset)
        self._iterator.set_state({"next_index": step * self._per_batch})

    def next_batch(self) -> Batch:
        return _concatenate([next(self._iterator) for _ in range(self._per_batch)])

    def close(self) -> None:
        self._open = False
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _concatenate(chunks: list[Batch]) -> Batch:
    joined: Batch = {}
    for name, first in chunks[0].items():
        parts = [chunk[name] for chunk in chunks]
        if isinstance(first, Mapping):
            joined[name] = _concatenate(parts)
        elif isinstance(first, np.ndarray):
            joined[name] = np.concatenate(parts) if len(parts) > 1 else first
        else:
            joined[name] = [item for part in parts for item in part]
    return joined


class TrainBatches:
    """Endless iterator of this host's part of the global batches; see the module's text."""

    def __init__(
        self,
        config: DataConfig,
        modalities: Sequence[str],
        *,
        seed: int,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        source: Source | None = None,
    ):
        if global_batch_size % process_count:
            raise ValueError(
                f"global_batch_size={global_batch_size} cannot be dealt to {process_count} hosts; "
                "use a multiple of their number."
            )
        self.source = source or open_source(config.train)
        length = len(self.source)
        self._processor = Processor(config, modalities, getattr(self.source, "embedded", ()))
        self._seed = seed
        self._global_size = global_batch_size
        self._local_size = global_batch_size // process_count
        self._first_row = process_index * self._local_size
        self._order = order_of_source(
            self.source,
            length,
            per_epoch=config.examples_per_epoch,
            seed=seed,
            shuffle=config.shuffle,
        )
        self.examples_per_epoch = self._order.per_epoch
        self.steps_per_epoch = self.examples_per_epoch // global_batch_size
        self._check_sizes(config, length)
        self._counter = SkipCounter(config.max_skipped_share)
        self._config = config
        self._reader = _ChunkedReader(
            self._load, local_size=self._local_size, steps=_ENDLESS // self._local_size,
            config=config,
        )  # fmt: skip
        self._step = 0
        self._started = False
        self.wait_seconds = 0.0

    def _check_sizes(self, config: DataConfig, length: int) -> None:
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"An epoch of {self.examples_per_epoch} examples (data.examples_per_epoch="
                f"{config.examples_per_epoch}, {length} in {config.train!r}) is smaller than "
                f"global_batch_size={self._global_size}; lower the batch or bring more data."
            )
        mixed = getattr(self.source, "weights", None) is not None
        if config.examples_per_epoch > length and not mixed:
            raise ValueError(
                f"data.examples_per_epoch={config.examples_per_epoch} exceeds the {length} "
                f"examples of {config.train!r}; use 0 for all of them."
            )

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if not self._started:
            self._reader.start(self._step)
            self._started = True
        batch = self._reader.next_batch()
        self._step += 1
        self.wait_seconds += time.perf_counter() - begin
        return batch

    def _load(self, step: int, rows: np.ndarray) -> Batch:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        positions = step_in_epoch * self._global_size + self._first_row + rows
        indices = self._order.indices(epoch, positions)
        loaded = [
            self._load_one(epoch, int(position), int(index))
            for position, index in zip(positions, indices, strict=True)
        ]
        self._counter.add_read(len(loaded))
        batch: Batch = self._processor.batch([inputs for _, inputs in loaded])
        batch["index"] = np.array([index for index, _ in loaded], np.int64)
        return batch

    def _load_one(self, epoch: int, position: int, index: int) -> tuple[int, dict[str, Any]]:
        """The example of a position, or the first usable one of its replacements."""
        fields = self._processor.fields()
        for attempt in range(1, _MAX_REPLACEMENTS + 1):
            # Keyed by the position, not by the host or thread that happens to read it.
            draws = Draws(self._seed, 21, epoch, position)
            name = f"example {index}"
            try:
                example = self.source.read(index, fields)
                name = f"{name} ({example['id']})"
                return index, self._processor.train_example(example, draws)
            except BadExample as error:
                self._counter.add_skipped(name, error)
            index = int(self._order.indices(epoch, np.array([position]), attempt)[0])
        raise RuntimeError(
            f"{_MAX_REPLACEMENTS} examples in a row were unusable at position {position} of epoch "
            f"{epoch}: {dict(self.skipped)}. Repair the data."
        )

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of skipped examples by kind, on this host, since the iterator was made."""
        return self._counter.kinds

    def get_state(self) -> dict[str, int]:
        """Where the iterator stands: the number of the next step. Independent of the hosts."""
        return {"step": self._step}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues from a state of `get_state`, of any number of hosts."""
        self.close()
        self._step = int(state["step"])

    def fingerprint(self) -> dict[str, Any]:
        """All that decides which arrays come at which step; compare before resuming."""
        return {
            "source": self.source.fingerprint(),
            "length": len(self.source),
            "examples_per_epoch": self.examples_per_epoch,
            "shuffle": self._config.shuffle,
            "seed": self._seed,
            "global_batch_size": self._global_size,
            "modalities": list(self._processor.modalities),
            **self._processor.fingerprint(),
        }

    def close(self) -> None:
        """Ends the reader threads; the next batch starts them again."""
        self._reader.close()
        self._started = False


def train_batches(
    config: DataConfig,
    modalities: Sequence[str],
    *,
    seed: int,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Opens `config.train` and returns the endless iterator of this host's batches."""
    return TrainBatches(
        config,
        modalities,
        seed=seed,
        global_batch_size=global_batch_size,
        process_index=process_index,
        process_count=process_count,
    )


class EvalBatches:
    """All examples of a source in order, the last batch filled up; iterate as often as needed.

    Beside the inputs a batch has "index", "valid" (False for filling and for unusable examples,
    whose inputs repeat another example), "label" (-1 where there is none), "captions" (lists of
    strings) and "id".
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        modalities: Sequence[str],
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size={batch_size} cannot be dealt to {process_count} hosts; use a multiple."
            )
        self.source = source
        self._processor = Processor(config, modalities, getattr(source, "embedded", ()))
        self._fields = {*self._processor.fields(), "text", "label"}
        self._size = batch_size
        self._local = batch_size // process_count
        self._first_row = process_index * self._local
        self._config = config
        self._counter = SkipCounter(config.max_skipped_share)

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self._size)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of unusable examples by kind."""
        return self._counter.kinds

    def __iter__(self) -> Iterator[Batch]:
        reader = _ChunkedReader(
            self._load, local_size=self._local, steps=len(self), config=self._config
        )
        reader.start(0)
        try:
            for _ in range(len(self)):
                yield self._fill(reader.next_batch())
        finally:
            reader.close()

    def _load(self, step: int, rows: np.ndarray) -> Batch:
        indices = step * self._size + self._first_row + rows
        return {"rows": [self._load_one(int(index)) for index in indices]}

    def _load_one(self, index: int) -> tuple[int, Any, Any]:
        if index >= len(self.source):
            return index, None, {}
        example: dict[str, Any] = {}
        try:
            example = self.source.read(index, self._fields)
            inputs = self._processor.eval_example(example)
        except BadExample as error:
            self._counter.add_skipped(f"example {index} ({example.get('id', '?')})", error)
            return index, None, example
        self._counter.add_read(1)
        return index, inputs, example

    def _fill(self, loaded: Batch) -> Batch:
        """One batch of the rows; unusable ones repeat a usable example."""
        rows = loaded["rows"]
        some = next((inputs for _, inputs, _ in rows if inputs is not None), None)
        if some is None:
            some = self._any_usable()
        batch: Batch = self._processor.batch([inputs or some for _, inputs, _ in rows])
        captions = [example.get("text", []) for _, _, example in rows]
        batch["captions"] = [[text] if isinstance(text, str) else list(text) for text in captions]
        batch["index"] = np.array([index for index, _, _ in rows], np.int64)
        batch["valid"] = np.array([inputs is not None for _, inputs, _ in rows])
        labels = [example.get("label", -1) for _, _, example in rows]
        batch["label"] = np.array(labels, np.int32)
        batch["id"] = [example.get("id", "") for _, _, example in rows]
        return batch

    def _any_usable(self) -> dict[str, Any]:
        """Inputs to fill a block with that has none of its own."""
        for index in range(len(self.source)):
            inputs = self._load_one(index)[1]
            if inputs is not None:
                return inputs
        raise ValueError(f"No example of the source is usable: {dict(self.skipped)}.")


def eval_batches(
    source: Source | str,
    config: DataConfig,
    modalities: Sequence[str],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Batches of a whole source (or source line) in order, without any randomness."""
    opened = open_source(source) if isinstance(source, str) else source
    return EvalBatches(
        opened,
        config,
        modalities,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
