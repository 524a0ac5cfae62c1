"""The task alignment: items and their own texts, with six random classes drawn as a matrix."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cwcl_jax.evaluation.alignment import (
    block_diagonality,
    choose_items,
    kept_by_projection,
    pair_metrics,
)
from cwcl_jax.evaluation.encoding import Items
from cwcl_jax.evaluation.prompts import readable
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.evaluation.tasks.base import at_least
from cwcl_jax.evaluation.tasks.labelled import (
    Cropped,
    Labelled,
    candidates,
    classified_items,
)
from cwcl_jax.evaluation.zero_shot import normalise


@dataclass(frozen=True)
class Alignment(Cropped, Labelled):
    """Compares items with their own texts: numbers over all, a matrix of some (Figures 7 and 8)."""

    tower: str = "image"
    text_tower: str = "text"  # reads the items' texts
    classes: int = 6
    items_per_class: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        # The blocks of a matrix need two classes of two items each.
        at_least(2, self, "classes", "items_per_class")

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        self.require_tower("text_tower", towers)
        super().check(towers, cache_dir)

    def run(self, name: str, runner: Runner) -> TaskResult:
        return run_alignment(name, self, runner)

    @classmethod
    def tables(cls, results: Sequence[TaskResult]) -> list[Table]:
        return [_table(results)]


def run_alignment(name: str, task: Alignment, runner: Runner) -> TaskResult:
    """Returns numbers over all items, and the matrix of the chosen ones."""
    items, labels, classes = classified_items(task, runner)
    without = [i for i, group in zip(items.ids, items.captions, strict=True) if not group]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} items of {task.source!r} have no text (the first: "
            f"{without[0]}); alignment compares items with their own texts."
        )
    u = normalise(items.embeds)
    v = normalise(runner.sentences([group[0] for group in items.captions], tower=task.text_tower))
    chosen = choose_items(
        labels, classes=task.classes, items_per_class=task.items_per_class, seed=task.seed
    )
    matrix, drawn = u[chosen] @ v[chosen].T, labels[chosen]
    metrics = block_diagonality(matrix, drawn)
    for key, value in pair_metrics(u, v, seed=task.seed).items():
        renamed = key.replace("uniformity_u", f"uniformity_{task.tower}")
        metrics[renamed.replace("uniformity_v", f"uniformity_{task.text_tower}")] = value
    metrics |= _projected(task, items, runner)
    return TaskResult(
        name=name,
        task=task,
        metrics=metrics,
        chance={"block_diagonality": 0.0, "block_diagonality_other_items": 0.0},
        items={
            "ids": np.asarray(items.ids),
            "labels": labels,
            "matrix": matrix,
            "matrix_ids": np.asarray([items.ids[i] for i in chosen]),
            "matrix_classes": np.asarray([readable(classes.titles[c]) for c in drawn]),
        },
    )


def _projected(task: Alignment, items: Items, runner: Runner) -> dict[str, float]:
    """Returns what the projection of the side that gives the weights preserves.

    Empty if that side is unknown or is neither of the two towers.
    """
    if runner.features is None or runner.weights_from not in (task.tower, task.text_tower):
        return {}
    if runner.weights_from == task.text_tower:
        # Items with equal texts count once: their similarity is no merit of the projection.
        sentences = list(dict.fromkeys(group[0] for group in items.captions))
        p = runner.sentences(sentences, tower=task.text_tower, features="features")
        u = runner.sentences(sentences, tower=task.text_tower)
    else:
        view, _ = candidates(task, runner)
        p, u = runner.items(view, task.tower, features="features").embeds, items.embeds
    return kept_by_projection(p, u, seed=task.seed)


def _table(results: Sequence[TaskResult]) -> Table:
    keys = list(dict.fromkeys(key for result in results for key in result.metrics))
    rows = [
        (
            key.replace("_", " "),
            *(f"{r.metrics[key]:.4f}" if key in r.metrics else "" for r in results),
        )
        for key in keys
    ]
    header = ("alignment", *(result.name for result in results))
    notes = ("block diagonality = mean cosine within classes minus mean cosine between them.",)
    return Table("Alignment of the two modalities", header, tuple(rows), notes)
