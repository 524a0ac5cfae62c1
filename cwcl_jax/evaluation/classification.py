"""Classification tasks: zero_shot (pictures), intent and keywords (recordings).

All of them compare items with class embeddings from prompts; they differ in where prompts come
from. Speech tasks report the data set's own sentences and the general templates (the # columns of
CWCL Table 8), and the text upper bound: the reference texts classified by the text tower.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation import prompts
from cwcl_jax.evaluation.class_names import Classes, resolve_classes
from cwcl_jax.evaluation.encoding import Items, View
from cwcl_jax.evaluation.options import SPEECH_KINDS, TaskConfig
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals
from cwcl_jax.evaluation.zero_shot import (
    class_embeds,
    classification_chance,
    classification_metrics,
    label_ranks,
    per_class_report,
    predict,
)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of every class under one name; `suffix` marks its metrics."""

    name: str
    suffix: str
    prompts: tuple[tuple[str, ...], ...]

    def described(self) -> np.ndarray:
        """Name with the number of prompts, and a hash of them, to compare two runs by."""
        exact = hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]
        return np.asarray([f"{self.name} ({sum(map(len, self.prompts))})", exact])


@dataclass
class _Tally:
    """What the prompt sets of a task add up to."""

    metrics: dict[str, float]
    chance: dict[str, float]
    hits: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]


def run_classification(name: str, task: TaskConfig, runner: Runner) -> TaskResult:
    """top-k accuracies and mean per-class recall, for every prompt set of the task."""
    view, classes = candidates(task, runner)
    # Before the items: a missing file of prompts should not cost their encoding.
    sets = prompt_sets(task, classes, runner)
    items, labels = embed_items(view, classes, task, runner)
    tally = _Tally({}, {}, {}, {})
    texts = _reference_texts(task, items)
    text_embeds = runner.sentences(texts) if texts and task.text_upper_bound else None
    first: Float[np.ndarray, "c d"] | None = None
    for chosen in sets:
        embeds = embed_classes(chosen, runner)
        usable = _usable(chosen, classes, labels, runner)
        first = embeds if first is None else first
        _score(tally, "", chosen, items.embeds, embeds, labels, usable, task)
        if text_embeds is not None:
            _score(tally, "text_", chosen, text_embeds, embeds, labels, usable, task)
    assert first is not None
    predicted = predict(items.embeds, first, _non_empty(sets[0]))
    groups = np.unique(texts, return_inverse=True)[1] if texts else None
    return TaskResult(
        name=name,
        kind=task.kind,
        source=task.source,
        metrics=tally.metrics,
        chance=tally.chance,
        intervals=bootstrap_intervals(tally.hits, task, groups=groups),
        items={"ids": np.asarray(items.ids), "labels": labels, "predicted": predicted}
        | ({} if groups is None else {"groups": groups})
        | tally.ranks
        | {"class_names": np.asarray(classes.titles)}
        | {f"prompts{chosen.suffix}": chosen.described() for chosen in sets},
        extras={
            "class_names": classes.titles,
            "prompt_sets": {s.suffix: (s.name, sum(map(len, s.prompts))) for s in sets},
            "per_class": per_class_report(tally.ranks["rank"], labels, predicted, classes.titles),
            "template_counts": task.template_counts,
            "modality": task.modality,
        },
        warnings=tuple(runner.warnings),
        seconds=dict(runner.clock.seconds),
        in_distribution=task.in_distribution,
    )


def classified_items(
    task: TaskConfig, runner: Runner
) -> tuple[Items, Int[np.ndarray, "n"], Classes]:
    """The items whose class is a candidate, embedded; their classes; all candidates."""
    view, classes = candidates(task, runner)
    return *embed_items(view, classes, task, runner), classes


def candidates(task: TaskConfig, runner: Runner) -> tuple[View, Classes]:
    """The classes of a task, and the items of its source that belong to one of them."""
    view = runner.open(task.source, task)
    classes = resolve_classes(view.class_names, task)
    for warning in classes.warnings:
        runner.warn(warning)
    if (classes.candidate_of >= 0).all():
        return view, classes
    kept = np.flatnonzero(classes.of_labels(runner.labels(view)) >= 0)
    runner.warn(
        f"{len(view) - len(kept)} of {len(view)} items belong to classes that are no candidates, "
        "and take no part."
    )
    if not len(kept):
        raise ValueError("no item belongs to a candidate class; check class_subset.")
    return runner.select(view, kept), classes


def embed_items(
    view: View, classes: Classes, task: TaskConfig, runner: Runner
) -> tuple[Items, Int[np.ndarray, "n"]]:
    """The items of `view`, and which candidate each belongs to."""
    features = task.features if task.kind in ("linear_probe", "few_shot") else "embeds"
    items = runner.items(view, task.modality, features=features)
    if (items.labels < 0).any():
        raise ValueError(
            f"item {items.ids[int(np.argmin(items.labels))]} of {task.source!r} has no label; this "
            "task needs a source with labels."
        )
    return items, classes.of_labels(items.labels)


def prompt_sets(task: TaskConfig, classes: Classes, runner: Runner) -> list[PromptSet]:
    """The prompt sets of a task; the first one gives the metrics without a suffix."""
    name, templates = task_templates(task)
    if name == "dataset":
        sets = [PromptSet("dataset", "", _dataset_prompts(task, classes, runner))]
    else:
        sets = [_filled(name, "", templates, classes)]
        for k in task.template_counts:
            some = prompts.first_templates(templates, k)
            sets.append(_filled(f"{name}, k={k}", f"_k{k}", some, classes))
    if task.kind in SPEECH_KINDS and name != "general":
        sets.append(_filled("general", "_general", prompts.GENERAL, classes))
    return sets


def task_templates(task: TaskConfig) -> tuple[str, tuple[str, ...]]:
    """The name of a task's templates and, where they are not the data set's own, the templates.

    Raises:
      ValueError or FileNotFoundError: the task's fields, or the file they name, cannot be used.
    """
    name = task.templates or _usual_templates(task)
    if name != "dataset":
        templates = prompts.load_templates(name)
        for k in task.template_counts:
            prompts.first_templates(templates, k)
        return name, templates
    if not task.template_source:
        raise ValueError("templates='dataset' needs template_source, a source with sentences.")
    if task.template_counts:
        raise ValueError(
            "template_counts counts templates of a list, but templates='dataset' are whole "
            "sentences; use sentences_per_class."
        )
    return name, ()


def embed_classes(chosen: PromptSet, runner: Runner) -> Float[np.ndarray, "c d"]:
    """The class embeddings of a prompt set."""
    sentences = [sentence for group in chosen.prompts for sentence in group]
    return class_embeds(runner.sentences(sentences), [len(group) for group in chosen.prompts])


def _usual_templates(task: TaskConfig) -> str:
    if task.kind == "zero_shot":
        return "simple"
    if task.template_source:
        return "dataset"
    if task.kind == "keywords":
        return "name"
    raise ValueError(
        "an intent task takes its templates from the data set's own sentences: set template_source "
        "(e.g. slurp:/data/slurp?split=devel), or templates='general'."
    )


def _filled(name: str, suffix: str, templates: Sequence[str], classes: Classes) -> PromptSet:
    filled = [
        tuple(prompts.fill(templates, [prompts.readable(n) for n in names]))
        for names in classes.names
    ]
    return PromptSet(name, suffix, tuple(filled))


def _dataset_prompts(
    task: TaskConfig, classes: Classes, runner: Runner
) -> tuple[tuple[str, ...], ...]:
    """The sentences of `template_source`, by class; for keywords those that hold the word."""
    view = runner.open(task.template_source, TaskConfig(), option="template_source")
    texts = runner.texts(view)
    limit = task.sentences_per_class
    if view.class_names is None and task.kind == "keywords":
        flat = [text for group in texts for text in group]
        groups = prompts.sentences_with_word(flat, classes.titles, limit=limit)
        return tuple(map(tuple, groups))
    if view.class_names is None:
        raise ValueError(
            f"template_source={task.template_source!r} has no classes; it must be labelled."
        )
    # By name: the classes of another split may be numbered in another way.
    place = {name: at for at, name in enumerate(classes.source_names)}
    number = [place.get(name, -1) for name in view.class_names]
    pairs = [
        (text, number[label])
        for group, label in zip(texts, runner.labels(view), strict=True)
        for text in group
        if number[label] >= 0
    ]
    sentences, owners = [text for text, _ in pairs], [at for _, at in pairs]
    groups = prompts.sentences_by_class(sentences, owners, len(classes.names), limit=limit)
    return tuple(map(tuple, groups))


def _non_empty(chosen: PromptSet) -> Int[np.ndarray, "u"]:
    usable = np.flatnonzero([len(group) for group in chosen.prompts])
    if not len(usable):
        raise ValueError(f"no class has a prompt in the set {chosen.name!r}.")
    return usable


def _usable(
    chosen: PromptSet, classes: Classes, labels: Int[np.ndarray, "n"], runner: Runner
) -> Int[np.ndarray, "u"]:
    """The classes that have prompts; items of the others can never be right."""
    usable = _non_empty(chosen)
    empty = np.setdiff1d(np.arange(len(classes.names)), usable)
    if len(empty):
        names = ", ".join(classes.titles[c] for c in empty[:5])
        lost = int(np.isin(labels, empty).sum())
        runner.warn(
            f"{len(empty)} class(es) have no {chosen.name} sentence ({names}): they are no "
            f"candidates there, and their {lost} item(s) count as wrong."
        )
    return usable


def _reference_texts(task: TaskConfig, items: Items) -> list[str]:
    """The text of every item, where a speech task has them all."""
    if task.kind not in SPEECH_KINDS or not all(items.captions):
        return []
    return [captions[0] for captions in items.captions]


def _score(
    tally: _Tally,
    prefix: str,
    chosen: PromptSet,
    embeds: Float[np.ndarray, "n d"],
    classes: Float[np.ndarray, "c d"],
    labels: Int[np.ndarray, "n"],
    usable: Int[np.ndarray, "u"],
    task: TaskConfig,
) -> None:
    ranks = label_ranks(embeds, classes, labels, usable)
    metrics = classification_metrics(ranks, labels, class_count=len(classes), top_k=task.top_k)
    chance = classification_chance(labels, usable, task.top_k)
    for key, value in metrics.items():
        tally.metrics[f"{prefix}{key}{chosen.suffix}"] = value
        tally.chance[f"{prefix}{key}{chosen.suffix}"] = chance[key]
    for k in task.top_k:
        tally.hits[f"{prefix}top{k}{chosen.suffix}"] = ranks <= k
    tally.ranks[f"{prefix}rank{chosen.suffix}"] = ranks
