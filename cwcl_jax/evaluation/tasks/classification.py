"""Classification by prompts: zero_shot, intent and keywords.

All three compare items with class embeddings from prompts. They differ in the origin of the
prompts, which their classes define (`zero_shot.py`, `spoken.py`).
"""

from abc import abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.class_names import Classes
from cwcl_jax.evaluation.encoding import Items
from cwcl_jax.evaluation.results import Record, TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals
from cwcl_jax.evaluation.tables import (
    Table,
    drawn_groups,
    interval_notes,
    metric_cells,
    metric_header,
    percent_of,
)
from cwcl_jax.evaluation.tasks.base import at_least
from cwcl_jax.evaluation.tasks.labelled import Labelled, candidates, embed_items
from cwcl_jax.evaluation.tasks.prompt_sets import (
    PromptSet,
    embed_classes,
    non_empty,
    prompt_sets,
    task_templates,
)
from cwcl_jax.evaluation.zero_shot import (
    classification_chance,
    classification_metrics,
    label_ranks,
    per_class_report,
    predict,
)


@dataclass(frozen=True)
class Classification(Labelled):
    """Compares items with class embeddings from prompts.

    `templates` is "simple" (Table 3), "general" (A.3.5), "name" (the bare class name), "source"
    (the templates that come with the data, as in CLIP_benchmark's folders), "dataset" (sentences of
    `template_source`, by class) or a user's file (`prompts.load_templates`).
    """

    text_tower: str = "text"  # reads the prompts
    templates: str = ""  # "" = the source's own, else the default of the kind
    template_counts: tuple[int, ...] = ()  # e.g. (1, 5, 10): also with the first k templates
    template_source: str = ""  # source whose sentences are the templates of "dataset"
    sentences_per_class: int = 0  # at most this many of them per class; 0 = all
    top_k: tuple[int, ...] = (1, 5)  # 1 is always included
    in_distribution: str = ""  # the task whose accuracy robustness is compared with

    # Whether the general templates are reported in addition to the task's own.
    general_beside: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "sentences_per_class")
        at_least(1, self, "template_counts", "top_k")
        if 1 not in self.top_k:  # robustness and template curves need top-1
            object.__setattr__(self, "top_k", (1, *self.top_k))

    @abstractmethod
    def usual_templates(self) -> str:
        """Returns the value of `templates` that is used if it is empty."""

    def without_labels(self, sentences: Sequence[str], titles: Sequence[str]) -> list[list[str]]:
        """Returns the sentences of every class if `template_source` has no classes."""
        raise ValueError(
            f"template_source={self.template_source!r} has no classes; it must be labelled."
        )

    def reference_texts(self, items: Items) -> list[str]:
        """Returns a text for every item that states its content, or an empty list."""
        return []

    def classifies_texts(self) -> bool:
        """Returns whether the reference texts are also classified, by the text tower."""
        return False

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        self.require_tower("text_tower", towers)
        super().check(towers, cache_dir)
        task_templates(self, self.opened("source", cache_dir).templates)
        if self.template_source:
            self.opened("template_source", cache_dir)

    def run(self, name: str, runner: Runner) -> TaskResult:
        return run_classification(name, self, runner)

    @classmethod
    def tables(cls, results: Sequence[TaskResult]) -> list[Table]:
        return [_table(results)]

    def records(self, result: TaskResult) -> list[Record]:
        records = []
        for suffix, (name, _) in result.extras["prompt_sets"].items():
            for prefix, what in (("", ""), ("text_", " (text itself)")):
                renamed = {
                    f"acc{key[len(prefix) + 3 : len(key) - len(suffix)]}": key
                    for key in result.metrics
                    if _is_metric(key, f"{prefix}top", suffix)
                }
                key = f"{prefix}mean_per_class_recall{suffix}"
                if renamed:
                    renamed |= {"mean_per_class_recall": key}
                    records.append(Record("zeroshot_classification", name + what, renamed))
        return records


@dataclass
class _Tally:
    """The accumulated results of a task's prompt sets."""

    metrics: dict[str, float]
    chance: dict[str, float]
    hits: dict[str, np.ndarray]
    ranks: dict[str, np.ndarray]


def run_classification(name: str, task: Classification, runner: Runner) -> TaskResult:
    """Returns top-k accuracies and mean per-class recall, for every prompt set of the task."""
    view, classes = candidates(task, runner)
    # Before the items: a missing file of prompts should not waste their encoding.
    sets = prompt_sets(task, classes, runner, view.templates)
    items, labels = embed_items(view, classes, task, runner)
    tally = _Tally({}, {}, {}, {})
    texts = task.reference_texts(items)
    bounded = texts and task.classifies_texts()
    text_embeds = runner.sentences(texts, tower=task.text_tower) if bounded else None
    first: Float[np.ndarray, "c d"] | None = None
    for chosen in sets:
        embeds = embed_classes(chosen, runner, task.text_tower)
        usable = _usable(chosen, classes, labels, runner)
        first = embeds if first is None else first
        _score(tally, "", chosen, items.embeds, embeds, labels, usable, task)
        if text_embeds is not None:
            _score(tally, "text_", chosen, text_embeds, embeds, labels, usable, task)
    assert first is not None
    predicted = predict(items.embeds, first, non_empty(sets[0]))
    groups = np.unique(texts, return_inverse=True)[1] if texts else None
    return TaskResult(
        name=name,
        task=task,
        metrics=tally.metrics,
        chance=tally.chance,
        intervals=bootstrap_intervals(tally.hits, task, groups=groups),
        items={"ids": np.asarray(items.ids), "labels": labels, "predicted": predicted}
        | ({} if groups is None else {"groups": groups})
        | tally.ranks
        | {"class_names": np.asarray(classes.titles), "top_k": np.asarray(task.top_k)}
        | {f"prompts{chosen.suffix}": chosen.described() for chosen in sets},
        extras={
            "class_names": classes.titles,
            "prompt_sets": {s.suffix: (s.name, sum(map(len, s.prompts))) for s in sets},
            "per_class": per_class_report(tally.ranks["rank"], labels, predicted, classes.titles),
            "template_counts": task.template_counts,
        },
        in_distribution=task.in_distribution,
    )


def _usable(
    chosen: PromptSet, classes: Classes, labels: Int[np.ndarray, "n"], runner: Runner
) -> Int[np.ndarray, "u"]:
    """Returns the classes that have prompts; items of other classes always count as wrong."""
    usable = non_empty(chosen)
    empty = np.setdiff1d(np.arange(len(classes.names)), usable)
    if len(empty):
        names = ", ".join(classes.titles[c] for c in empty[:5])
        lost = int(np.isin(labels, empty).sum())
        runner.warn(
            f"{len(empty)} class(es) have no {chosen.name} sentence ({names}): they are not "
            f"candidates there, and their {lost} item(s) count as wrong."
        )
    return usable


def _score(
    tally: _Tally,
    prefix: str,
    chosen: PromptSet,
    embeds: Float[np.ndarray, "n d"],
    classes: Float[np.ndarray, "c d"],
    labels: Int[np.ndarray, "n"],
    usable: Int[np.ndarray, "u"],
    task: Classification,
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


def _table(results: Sequence[TaskResult]) -> Table:
    tops = sorted({key for result in results for key in result.metrics if _is_top(key)}, key=_k)
    header = ["task", "prompts (all classes)"]
    for top in tops:
        header += metric_header(f"top-{_k(top)} %", first=top == tops[0])
    rows = []
    for result in results:
        for prefix, suffix, name in _shown_sets(result):
            row = [result.name, name]
            for top in tops:
                row += metric_cells(result, f"{prefix}{top}{suffix}", first=top == tops[0])
            row.append(percent_of(result, f"{prefix}mean_per_class_recall{suffix}"))
            count, texts = str(len(result.items["labels"])), drawn_groups(result)
            rows.append((*row, f"{count} ({texts} texts)" if texts else count))
    notes = interval_notes(results)
    if any("_general" in result.extras["prompt_sets"] for result in results):
        notes.append("general: the templates of A.3.5, the columns marked # in the paper's tables.")
    header += ["per class %", "items"]
    return Table("Zero-shot classification", tuple(header), tuple(rows), tuple(notes))


def _shown_sets(result: TaskResult) -> Iterable[tuple[str, str, str]]:
    """Yields (prefix, suffix, name) of the prompt sets; k = all templates is not repeated."""
    sets = result.extras["prompt_sets"]
    counted = [count for suffix, (_, count) in sets.items() if suffix.startswith("_k")]
    for suffix, (name, count) in sets.items():
        if suffix == "" and count in counted:
            continue
        yield "", suffix, f"{name} ({count})"
        if any(key.startswith("text_") for key in result.metrics):
            yield "text_", suffix, f"{name} ({count}), the text itself"


def _is_metric(key: str, start: str, end: str) -> bool:
    middle = key[len(start) : len(key) - len(end)] if end else key[len(start) :]
    return key.startswith(start) and key.endswith(end) and middle.isdigit()


def _is_top(key: str) -> bool:
    return key.startswith("top") and key[3:].isdigit()


def _k(key: str) -> int:
    return int(key.removeprefix("top"))
