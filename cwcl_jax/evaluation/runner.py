"""Runs tasks: provides opened sources, labels, and embeddings of items and sentences."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.data.content import row_keys
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.overlap import shared_examples
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.data.sources import Source, open_source
from cwcl_jax.evaluation.encoding import (
    Clock,
    Encode,
    Items,
    View,
    encode_items,
    encode_sentences,
)
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.modalities.features import only_features

# Task fields that name data.
_SOURCES = ("source", "train_source", "template_source")


@dataclass
class Runner:
    """An encoder with the preparation of its inputs. `warnings` collects what readers must know."""

    encode: Encode
    data: DataConfig
    batch_size: int = 256
    features: Encode | None = None  # like encode, before the projection head
    weights_from: str = ""  # the tower that gives the loss its weights, if any
    clock: Clock = field(default_factory=Clock)
    warnings: list[str] = field(default_factory=list)
    # Embeddings of earlier tasks of the same evaluation: items, and sentences by tower.
    known_items: dict[Any, tuple[Items, list[str]]] = field(default_factory=dict)
    # Fingerprints of the sources that were opened, by line.
    opened: dict[str, str] = field(default_factory=dict)
    known_sentences: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)

    def open(
        self,
        line: str,
        *,
        max_items: int = 0,
        crop_border: int = 0,
        option: str = "source",
        seed: int = 0,
    ) -> View:
        """Returns the source that `line` names, or `max_items` of it (0 = all), spread evenly.

        `option` is the name of the field that held the line, for messages; `seed` draws the items.
        """
        if not line:
            raise ValueError(f"{option} is empty; name a source, such as scenes:test?task=shape.")
        source = open_source(line, cache_dir=self.data.cache_dir)
        self.opened[line] = source.fingerprint()
        if not max_items or max_items >= len(source):
            return self._view(source, np.arange(len(source)), crop_border)
        self.warn(
            f"{max_items} of {len(source)} examples of {line}, drawn evenly with seed {seed} "
            "(max_items)."
        )
        # Draws one item from each of `max_items` equal ranges, because data is often sorted by
        # class.
        edges = np.linspace(0, len(source), max_items + 1).astype(np.int64)
        drawn = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
        return self._view(source, drawn, crop_border)

    def select(self, view: View, chosen: Int[np.ndarray, "n"]) -> View:
        """Returns some examples of `view`, by their position in it."""
        return self._view(view.source, view.indices[chosen], view.crop_border)

    def _view(self, source: Source, indices: Int[np.ndarray, "n"], crop_border: int) -> View:
        return View(source, indices, inputs=self.data.inputs, crop_border=crop_border)

    def labels(self, view: View) -> Int[np.ndarray, "n"]:
        """Returns the labels of all examples, without reading their other fields."""
        labels = [view.read(i, ("label",)).get("label") for i in range(len(view))]
        if any(label is None for label in labels):
            raise ValueError(
                f"example {labels.index(None)} of the source has no label; this task needs a "
                "source with labels."
            )
        return np.asarray(labels, np.int64)

    def texts(self, view: View) -> list[tuple[str, ...]]:
        """Returns the captions of all examples, without reading their other fields."""
        texts = [view.read(i, ("text",)).get("text") or () for i in range(len(view))]
        return [(text,) if isinstance(text, str) else tuple(text) for text in texts]

    def items(self, view: View, tower: str, *, features: str = "embeds") -> Items:
        """Returns all examples embedded by `tower`; unusable ones are left out, with a warning."""
        key = (view.fingerprint(), tower, features)
        if key not in self.known_items:
            before, self.warnings = self.warnings, []
            items = self._embed_items(view, tower, features)
            self.known_items[key] = items, self.warnings
            self.warnings = before
        items, warnings = self.known_items[key]
        for warning in warnings:
            self.warn(warning)
        return items

    def _embed_items(self, view: View, tower: str, features: str) -> Items:
        # Imported here, so that settings can be read without the libraries of the pipeline.
        from cwcl_jax.data.pipeline import eval_batches

        batches = eval_batches(view, self.data, (tower,), batch_size=self.batch_size)
        watched = self._with_remarks(batches, tower)
        items = encode_items(watched, tower, encode=self._encoder(features), clock=self.clock)
        if len(items) < len(view):
            kinds = ", ".join(f"{kind}: {count}" for kind, count in batches.skipped.items())
            self.warn(
                f"{len(view) - len(items)} of {len(view)} examples were unusable and are left out "
                f"({kinds})."
            )
        return items

    def sentences(
        self, sentences: Sequence[str], *, tower: str = "text", features: str = "embeds"
    ) -> Float[np.ndarray, "n d"]:
        """Returns the embeddings of `sentences` by the tower that reads them, or its features."""
        known = self.known_sentences
        new = [s for s in dict.fromkeys(sentences) if (tower, features, s) not in known]
        if new or not sentences:
            embeds = encode_sentences(
                new,
                encode=self._encoder(features),
                data=self.data,
                batch_size=self.batch_size,
                clock=self.clock,
                tower=tower,
            )
            self._tell_of_losses(new, tower)
            known.update(zip([(tower, features, s) for s in new], embeds, strict=True))
        return np.stack([known[tower, features, sentence] for sentence in sentences])

    def _tell_of_losses(self, sentences: Sequence[str], tower: str) -> None:
        """Warns of sentences that the tower truncates or cannot tell apart."""
        reader = self.data.inputs_of(tower)
        lost = {s: remarks for s in sentences if (remarks := reader.lost(s))}
        for remark, count in Counter(r for remarks in lost.values() for r in remarks).items():
            self.warn(f"{count} of {len(sentences)} {tower} sentences are {remark}.")
        equal = len(lost) - len(set(row_keys(reader.batch(list(lost))))) if lost else 0
        if equal:
            self.warn(
                f"{equal} of them have the same tokens as an earlier one: the {tower} tower cannot "
                "tell them apart."
            )

    def warn(self, message: str) -> None:
        """Adds a warning, once."""
        if message not in self.warnings:
            self.warnings.append(message)

    def _encoder(self, features: str) -> Encode:
        if features == "embeds":
            return self.encode
        if self.features is None:
            raise ValueError(
                "features='features' needs an encoder that returns the features before its "
                "projection head; use features='embeds' with this one."
            )
        return self.features

    def _with_remarks(
        self, batches: Iterable[Mapping[str, Any]], tower: str
    ) -> Iterator[Mapping[str, Any]]:
        """Yields the batches unchanged, then warns of the modality's remarks about their items."""
        counts: dict[str, int] = {}
        for batch in batches:
            if not only_features(batch[tower]):
                remarks = self.data.inputs_of(tower).remarks(batch[tower])
                for remark, rows in remarks.items():
                    counts[remark] = counts.get(remark, 0) + int(np.sum(rows & batch["valid"]))
            for lost, valid in zip(batch["lost"], batch["valid"], strict=True):
                for remark in lost.get(tower, ()) if valid else ():
                    counts[remark] = counts.get(remark, 0) + 1
            yield batch
        for remark, count in counts.items():
            if count:
                self.warn(f"{count} {tower} item(s) are {remark}; they are evaluated as they are.")


def run_task(
    name: str,
    task: Task,
    *,
    encode: Encode,
    data: DataConfig,
    batch_size: int = 256,
    features: Encode | None = None,
    weights_from: str = "",
    earlier: Runner | None = None,
) -> TaskResult:
    """Returns the result of one task with one encoder.

    Args:
      name: name under which the results are reported.
      task: the task.
      encode: `encode(tower, inputs) -> (b, d)`, called with batches of `batch_size`.
      data: how pictures, sentences and recordings become inputs.
      batch_size: examples per call.
      features: like `encode`, before the projection head; for probes that ask for it.
      weights_from: the tower that gives the loss its weights. With `features`, alignment also
          reports what its projection preserves.
      earlier: runner of another task with the same encoder, whose embeddings are reused.
    """
    runner = Runner(encode, data, batch_size, features, weights_from)
    if earlier is not None:
        runner.known_items = earlier.known_items
        runner.known_sentences = earlier.known_sentences
    try:
        return _completed(task.run(name, runner), task, runner)
    except TooManyBadExamples as error:
        raise TooManyBadExamples(f"evaluation task {name!r}: {error}") from error
    except (ValueError, FileNotFoundError) as error:
        # Not the error's own type: many subclasses of ValueError take other arguments.
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"evaluation task {name!r}: {error}") from error


def _completed(result: Any, task: Task, runner: Runner) -> TaskResult:
    """Returns a result with its warnings and times, and with plain floats as metrics."""
    if not isinstance(result, TaskResult):
        raise ValueError(f"run() of a {task.kind} task returned {result!r}, not a TaskResult.")
    return replace(
        result,
        metrics={key: float(value) for key, value in result.metrics.items()},
        items=result.items
        and {**result.items, "data": np.asarray([f"{k} {v}" for k, v in runner.opened.items()])},
        data=dict(runner.opened),
        warnings=tuple(runner.warnings),
        seconds=dict(runner.clock.seconds),
    )


def run_tasks(
    config: EvaluationConfig,
    *,
    encode: Encode,
    data: DataConfig,
    features: Encode | None = None,
    weights_from: str = "",
    seen: Mapping[str, str] = MappingProxyType({}),
) -> list[TaskResult]:
    """Returns the results of all tasks of `config`, in order.

    `seen` holds, by task, a note on what of the task's data was trained on; it becomes a warning.
    """
    shared = Runner(encode, data, config.batch_size, features, weights_from)
    results = [
        run_task(
            name,
            task,
            encode=encode,
            data=data,
            batch_size=config.batch_size,
            features=features,
            weights_from=weights_from,
            earlier=shared,
        )
        for name, task in config.tasks.items()
    ]
    return [
        replace(result, warnings=(*result.warnings, f"{seen[result.name]}."))
        if result.name in seen
        else result
        for result in results
    ]


def fingerprints(config: EvaluationConfig, data: DataConfig) -> dict[str, dict[str, str]]:
    """Returns the fingerprints of every task's data: task -> option -> fingerprint."""
    found = {}
    for name, task in config.tasks.items():
        lines = {option: getattr(task, option, "") for option in _SOURCES}
        found[name] = {
            option: open_source(line, cache_dir=data.cache_dir).fingerprint()
            for option, line in lines.items()
            if line
        }
    return found


def seen_in_training(config: EvaluationConfig, train: Source, data: DataConfig) -> dict[str, str]:
    """Returns notes on which of the tasks' data is in the training data, by task name."""
    found = {}
    for name, task in config.tasks.items():
        source = open_source(task.source, cache_dir=data.cache_dir)
        told = shared_examples(train, source, {data.inputs_of(task.tower).field or "text"})
        if told:
            found[name] = told
    return found
