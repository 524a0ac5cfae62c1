"""The alignment task: items and their own texts, six random classes drawn as a matrix."""

import numpy as np

from cwcl_jax.evaluation.alignment import (
    block_diagonality,
    choose_items,
    kept_by_projection,
    pair_metrics,
)
from cwcl_jax.evaluation.classification import candidates, classified_items
from cwcl_jax.evaluation.encoding import Items
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.evaluation.prompts import readable
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.zero_shot import normalise


def run_alignment(name: str, task: TaskConfig, runner: Runner) -> TaskResult:
    """Numbers over all items; the matrix of the chosen ones."""
    items, labels, classes = classified_items(task, runner)
    without = [i for i, group in zip(items.ids, items.captions, strict=True) if not group]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} items of {task.source!r} have no text (the first: "
            f"{without[0]}); alignment compares items with their own texts."
        )
    u = normalise(items.embeds)
    v = normalise(runner.sentences([group[0] for group in items.captions]))
    chosen = choose_items(
        labels, classes=task.classes, items_per_class=task.items_per_class, seed=task.seed
    )
    matrix, drawn = u[chosen] @ v[chosen].T, labels[chosen]
    metrics = block_diagonality(matrix, drawn)
    for key, value in pair_metrics(u, v, seed=task.seed).items():
        renamed = key.replace("uniformity_u", f"uniformity_{task.modality}")
        metrics[renamed.replace("uniformity_v", "uniformity_text")] = value
    metrics |= _projected(task, items, runner)
    return TaskResult(
        name=name,
        kind=task.kind,
        source=task.source,
        metrics=metrics,
        chance={"block_diagonality": 0.0, "block_diagonality_other_items": 0.0},
        items={
            "ids": np.asarray(items.ids),
            "labels": labels,
            "matrix": matrix,
            "matrix_ids": np.asarray([items.ids[i] for i in chosen]),
            "matrix_classes": np.asarray([readable(classes.titles[c]) for c in drawn]),
        },
        extras={"modality": task.modality},
        warnings=tuple(runner.warnings),
        seconds=dict(runner.clock.seconds),
    )


def _projected(task: TaskConfig, items: Items, runner: Runner) -> dict[str, float]:
    """Of the side that gives the weights; nothing where it is unknown, or none of the two."""
    if runner.features is None or runner.weights_from not in (task.modality, "text"):
        return {}
    if runner.weights_from == "text":
        # Items that say the same count once: that they stay alike is no merit of the projection.
        sentences = list(dict.fromkeys(group[0] for group in items.captions))
        p, u = runner.sentences(sentences, features="features"), runner.sentences(sentences)
    else:
        view, _ = candidates(task, runner)
        p, u = runner.items(view, task.modality, features="features").embeds, items.embeds
    return kept_by_projection(p, u, seed=task.seed)
