"""The alignment task: items and their own texts, six random classes drawn as a matrix."""

import numpy as np

from cwcl_jax.evaluation.alignment import block_diagonality, choose_items, pair_metrics
from cwcl_jax.evaluation.classification import classified_items
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
