"""Batches for training, read by grain's threads in one global order.

Batch `step` holds the positions `step * B ... (step + 1) * B` of the order, and host h the h-th
block of them. The state is therefore only the number of the next step: it is exact, and the same
order continues on another number of hosts. Unusable examples are replaced by others that the order
itself determines, so every host always makes the same number of steps.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cwcl_jax.data.buckets import BucketedOrder
from cwcl_jax.data.composers import (
    ComposedOrder,
    ComposerError,
    Composition,
    check_settings,
    compose,
)
from cwcl_jax.data.cuts import counting_cuts
from cwcl_jax.data.eval_pipeline import EvalBatches, eval_batches
from cwcl_jax.data.options import DataConfig, features_name
from cwcl_jax.data.order import GlobalOrder
from cwcl_jax.data.processing import Batch, Processor, collect, join
from cwcl_jax.data.reader import CHUNK, ChunkedReader, reader_threads
from cwcl_jax.data.skipping import BadExample, SkipCounter, TooManyBadExamples
from cwcl_jax.data.sources import Source, check_training_line, open_source
from cwcl_jax.data.sources.base import require_fields

__all__ = ["EvalBatches", "TrainBatches", "eval_batches", "reader_threads", "train_batches"]

_MAX_REPLACEMENTS = 200
_ENDLESS = 1 << 53
# Rows that a thread loads in one call if nothing is decoded. If one of them is unusable, they are
# read again one by one.
_VECTOR_CHUNK = 256


class TrainBatches:
    """Endless iterator of this host's part of the global batches; see the module's docstring."""

    def __init__(
        self,
        config: DataConfig,
        towers: Sequence[str],
        *,
        seed: int,
        global_batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        source: Source | None = None,
        random: bool = True,
    ):
        """Makes the iterator, at step 0; no file of examples is read yet.

        Args:
          random: whether inputs are drawn as for training (crops, one of several captions); without
            they are as in an evaluation.
        """
        if global_batch_size % process_count:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not divisible by {process_count} hosts."
            )
        if source is None:
            check_training_line(config.train)
            source = open_source(config.train, cache_dir=config.cache_dir)
        self.source = source
        length = len(self.source)
        self._processor = Processor(config, towers, self.source.embedded)
        self._seed = seed
        self._random = random
        self._global_size = global_batch_size
        self._local_size = global_batch_size // process_count
        self._first_row = process_index * self._local_size
        self._check_epoch(config, length)
        self.check_composed(config)
        self._order = _order(config, self.source, global_batch_size, seed)
        self.examples_per_epoch = self._order.per_epoch
        self.steps_per_epoch = self.examples_per_epoch // global_batch_size
        self._check(config, length)
        self._buckets = self._make_buckets(config)
        self._counter = SkipCounter(config.max_skipped_share, length)
        self._config = config
        self._reader = ChunkedReader(
            self._load, local_size=self._local_size, steps=_ENDLESS // self._local_size,
            config=config, chunk=CHUNK if self._processor.raw else _VECTOR_CHUNK,
        )  # fmt: skip
        self._step = 0
        self._started = False
        self.wait_seconds = 0.0

    def _make_buckets(self, config: DataConfig) -> BucketedOrder | None:
        tower = self._processor.with_lengths
        if not tower or isinstance(self._order, ComposedOrder):
            return None
        modality = self._processor.inputs[tower]
        durations = self.source.durations
        if durations is None:
            raise ValueError(
                f"data.{tower}.buckets={modality.lengths[:-1]} needs the lengths of the examples, "
                f"which {config.train!r} does not provide; set data.{tower}.buckets=(), add a "
                "column duration (seconds) to a manifest, or read synthesised sentences with "
                "keep=auto."
            )
        return BucketedOrder(
            self._order,
            durations,
            lengths=modality.lengths,
            batch_size=self._global_size,
            window=modality.window,
            steps=self.steps_per_epoch,
        )

    def _check(self, config: DataConfig, length: int) -> None:
        require_fields(self.source, self._processor.fields(), config.train)
        if config.guide and config.guide not in self.source.embedded:
            raise ValueError(
                f"{config.train!r} has no features {config.guide!r}, which data.guide names (it "
                f"has {', '.join(self.source.embedded) or 'none'}); add them in the source line, "
                f"features={config.guide}:COLUMN or features_from={config.guide}:FILE."
            )
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"An epoch of {self.examples_per_epoch} examples (data.examples_per_epoch="
                f"{config.examples_per_epoch}, {length} in {config.train!r}) is smaller than "
                f"global_batch_size={self._global_size}; lower the batch size or add data."
            )

    def _check_epoch(self, config: DataConfig, length: int) -> None:
        tempered = config.mixture_temperature != 1
        if tempered and not self.source.parts:
            raise ValueError(
                f"data.mixture_temperature={config.mixture_temperature} needs several parts in "
                f"{config.train!r}, joined by ::."
            )
        mixed = self.source.weights is not None or tempered
        if config.examples_per_epoch > length and not mixed:
            raise ValueError(
                f"data.examples_per_epoch={config.examples_per_epoch} exceeds the {length} "
                f"examples of {config.train!r}; use 0 for all of them."
            )

    def check_composed(self, config: DataConfig) -> None:
        """Checks what can be checked of `config.batches` before its features exist.

        Raises:
          ValueError: other settings, or the source, allow no composed batches.
          ComposerError: its options are wrong.
        """
        if not config.batches:
            return
        if tower := self._processor.with_lengths:
            raise ValueError(
                f"data.batches={config.batches} and data.{tower}.buckets cannot be combined: "
                "buckets put examples of similar length into a batch."
            )
        if self.source.weights is not None or config.mixture_temperature != 1:
            raise ValueError(
                f"data.batches={config.batches} uses every example at most once per epoch: leave "
                "out weight= and data.mixture_temperature."
            )
        check_settings(config.batches, self._global_size)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        begin = time.perf_counter()
        if not self._started:
            self._reader.start(self._step)
            self._started = True
        batch = join(self._reader.next_chunks())
        self._step += 1
        self.wait_seconds += time.perf_counter() - begin
        return batch

    def _load(self, step: int, rows: np.ndarray) -> Batch:
        """Returns some rows of a batch for `join`: inputs, and example numbers as "index"."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        positions = step_in_epoch * self._global_size + self._first_row + rows
        length = None
        if self._buckets is None:
            indices = self._order.indices(epoch, positions)
        else:
            indices, length = self._buckets.batch(epoch, step_in_epoch)
            indices = indices[self._first_row + rows]
        vectors = self._load_vectors(indices)
        if vectors is not None:
            self._counter.add_read(len(indices))
            return vectors | {"index": indices.astype(np.int64)}
        loaded = [
            self._load_one(epoch, int(position), int(index), length)
            for position, index in zip(positions, indices, strict=True)
        ]
        with counting_cuts(self._counter.add_cut):
            self._processor.finish([inputs for _, inputs in loaded])
        return collect([inputs | {"index": np.int64(index)} for index, inputs in loaded])

    def _load_vectors(self, indices: np.ndarray) -> Batch | None:
        """Returns the rows as arrays, or None if not all inputs are vectors or one is unusable."""
        if self._processor.raw or self._config.labels:
            return None
        found = self.source.vectors(indices)
        if found is None:
            return None
        made: Batch = {
            tower: {"features": found[features_name(tower, modality)]}
            for tower, modality in self._processor.inputs.items()
        }
        return made | ({"guide": found[self._config.guide]} if self._config.guide else {})

    def _load_one(
        self, epoch: int, position: int, index: int, length: float | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Returns number and inputs of a position's example, or of its first usable replacement.

        Raises:
          TooManyBadExamples: too many replacements in a row are unusable.
          ComposerError: no other example can replace it in a composed batch.
        """
        fields, unusable = self._processor.fields(), None
        for attempt in range(1, _MAX_REPLACEMENTS + 1):
            name = f"example {index}"
            try:
                example = self.source.read(index, fields)
                name = f"{name} ({example['id']})"
                # Keyed by the position, so that the host and thread that read it have no effect.
                key = (self._seed, 21, epoch, position) if self._random else ()
                inputs = self._processor.train_example(example, *key, length=length)
                # Counted one by one: a limit that is reached in this batch is one of these too.
                self._counter.add_read(1)
                return index, inputs
            except BadExample as error:
                self._counter.add_skipped(name, error, index)
                unusable = unusable or (index, str(error))
            try:
                index = int(self._order.indices(epoch, np.array([position]), attempt)[0])
            except ComposerError as error:
                first, why = unusable
                told = f"{self._told(first)} is unusable ({why}), and {error}"
                raise ComposerError(told) from error
        raise TooManyBadExamples(
            f"{_MAX_REPLACEMENTS} examples in a row were unusable at position {position} of epoch "
            f"{epoch}: {dict(self.skipped)}. Repair the data."
        )

    def _told(self, index: int) -> str:
        """Returns an example's number with its id, if that can be read."""
        try:
            return f"example {index} ({self.source.read(index, ())['id']})"
        except BadExample:
            return f"example {index}"

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of different skipped examples by kind, on this host, since its creation."""
        return self._counter.kinds

    @property
    def tokens_cut(self) -> int:
        """Tokens truncated from the examples read, on this host, since its creation."""
        return self._counter.tokens_cut

    def get_state(self) -> dict[str, Any]:
        """Returns the position: the next step, its epoch, and the examples of that epoch before it.

        It does not depend on the hosts. Composed batches add `taken`: which sizes the epoch's
        batches had.
        """
        epoch, step = divmod(self._step, self.steps_per_epoch)
        state = {"step": self._step, "epoch": epoch, "examples": step * self._global_size}
        if isinstance(self._order, ComposedOrder):
            taken = self._order.taken(epoch, step)
            examples = sum(size * batches for size, batches in taken)
            return state | {"examples": examples, "taken": taken}
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues from a state of `get_state`, with any number of hosts and any batch size.

        If the batch size changed, the next batch begins at the first unused example, or up to a
        batch later, because batches begin at multiples of their size. Composed batches are then
        composed anew from the examples of the epoch that are still unused.
        """
        if "step" not in state:
            raise ValueError(
                f"Invalid position of the data: expected {{'step': n}}, got {dict(state)}."
            )
        self.close()
        self._step = int(state["step"])
        if "taken" in state and isinstance(self._order, ComposedOrder):
            epoch, step = self._order.go_on(int(state["epoch"]), state["taken"])
            self._step = epoch * self.steps_per_epoch + step
        elif "examples" in state:  # an earlier version saved only the step
            begun = -(-int(state["examples"]) // self._global_size)
            self._step = int(state["epoch"]) * self.steps_per_epoch + begun

    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that determines the arrays of each step, to compare on resuming."""
        return {
            "source": self.source.fingerprint(),
            "length": len(self.source),
            "examples_per_epoch": self.examples_per_epoch,
            "shuffle": self._config.shuffle,
            "seed": self._seed,
            "global_batch_size": self._global_size,
            "towers": list(self._processor.towers),
            **self._processor.fingerprint(),
        } | self._composed()

    def _composed(self) -> dict[str, Any]:
        """Returns what determines the batches beyond the plain order."""
        made: dict[str, Any] = {}
        if isinstance(self._order, ComposedOrder):
            made["batches"] = [self._config.batches, self._order.fingerprint()]
        if self._config.mixture_temperature != 1:
            made["mixture_temperature"] = self._config.mixture_temperature
        return made

    @property
    def told(self) -> str:
        """Text on how batches are composed, or a mixture's parts are drawn; "" for the default."""
        if isinstance(self._order, ComposedOrder):
            return self._order.told
        if self._config.mixture_temperature == 1:
            return ""
        order = self._order
        parts = ", ".join(
            f"{100 * quota / order.per_epoch:.3g}% ({quota / length:.3g} times its {length})"
            for quota, length in zip(order.quotas, order.lengths, strict=True)
        )
        return f"parts of an epoch of {order.per_epoch}: {parts}"

    @property
    def left_out(self) -> float | None:
        """Share of the examples that an epoch of composed batches leaves out; None for others."""
        return self._order.left_out_share if isinstance(self._order, ComposedOrder) else None

    def close(self) -> None:
        """Ends the reader threads; the next batch starts them again."""
        self._reader.close()
        self._started = False


def train_batches(
    config: DataConfig,
    towers: Sequence[str],
    *,
    seed: int,
    global_batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    source: Source | None = None,
    random: bool = True,
) -> TrainBatches:
    """Returns the endless iterator of this host's batches.

    The source is `source`, or by default that of `config.train`.
    """
    return TrainBatches(
        config,
        towers,
        seed=seed,
        global_batch_size=global_batch_size,
        process_index=process_index,
        process_count=process_count,
        source=source,
        random=random,
    )


def _order(
    config: DataConfig, source: Source, global_batch_size: int, seed: int
) -> GlobalOrder | ComposedOrder:
    if config.batches:

        def made(source: Source, size: int) -> Composition:
            return compose(config.batches, source, size, seed)

        return ComposedOrder(made, source, global_batch_size, config.examples_per_epoch)
    return order_of_source(
        source,
        len(source),
        per_epoch=config.examples_per_epoch,
        seed=seed,
        shuffle=config.shuffle,
        temperature=config.mixture_temperature,
    )


def order_of_source(
    source: Source,
    length: int,
    *,
    per_epoch: int,
    seed: int,
    shuffle: bool,
    temperature: float = 1.0,
) -> GlobalOrder:
    """Returns the order of a source; a mixture (with `parts` and `weights`) keeps its shares.

    Args:
      temperature: above 1 it brings the shares of a mixture closer to each other.
    """
    lengths = tuple(len(part) for part in source.parts) or (length,)
    weights = tuple(float(weight) for weight in source.weights or lengths)
    if temperature != 1:
        largest = max(weights)
        weights = tuple((weight / largest) ** (1 / temperature) for weight in weights)
    return GlobalOrder(lengths, weights, per_epoch or length, seed, shuffle)
