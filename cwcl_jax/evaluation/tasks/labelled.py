"""Tasks whose items belong to classes: the candidate classes, and the embedded items."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from cwcl_jax.evaluation.class_names import Classes, resolve_classes
from cwcl_jax.evaluation.encoding import Items, View
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.tasks.base import Task, at_least, one_of

UNMAPPED = ("error", "drop")


@dataclass(frozen=True)
class Cropped(Task):
    """A task whose items may be pictures, with an optional crop of the border."""

    crop_border: int = 0  # pixels on every side (ObjectNet's red frame: 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "crop_border")

    def open(self, runner: Runner) -> View:
        return runner.open(
            self.source, max_items=self.max_items, crop_border=self.crop_border, seed=self.seed
        )


@dataclass(frozen=True)
class Labelled(Task):
    """A task whose items have classes, with optional names by the user, or a subset of them."""

    class_names: str = ""  # file, or comma-separated names; "" = the source's own
    class_subset: str = ""  # file with the classes (names or indices) that stay candidates
    unmapped_classes: str = "error"  # "drop": leave out classes that class_names does not list

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("unmapped_classes", self.unmapped_classes, UNMAPPED)

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        self.require_tower("tower", towers)
        resolve_classes(self.opened("source", cache_dir).class_names, self)


def classified_items(
    task: Labelled, runner: Runner, *, output: str = "embeds"
) -> tuple[Items, Int[np.ndarray, "n"], Classes]:
    """Returns the embedded items of candidate classes, their classes, and all candidates."""
    view, classes = candidates(task, runner)
    return *embed_items(view, classes, task, runner, output=output), classes


def candidates(task: Labelled, runner: Runner) -> tuple[View, Classes]:
    """Returns the items of a task's source that belong to a candidate class, and the classes."""
    view = task.open(runner)
    classes = resolve_classes(view.class_names, task)
    for warning in classes.warnings:
        runner.warn(warning)
    if (classes.candidate_of >= 0).all():
        return view, classes
    kept = np.flatnonzero(classes.of_labels(runner.labels(view)) >= 0)
    runner.warn(
        f"{len(view) - len(kept)} of {len(view)} items belong to classes that are not candidates, "
        "and are left out."
    )
    if not len(kept):
        raise ValueError("no item belongs to a candidate class; check class_subset.")
    return runner.select(view, kept), classes


def embed_items(
    view: View, classes: Classes, task: Labelled, runner: Runner, *, output: str = "embeds"
) -> tuple[Items, Int[np.ndarray, "n"]]:
    """Returns the embedded items of `view`, and the candidate that each belongs to."""
    items = runner.items(view, task.tower, features=output)
    if (items.labels < 0).any():
        raise ValueError(
            f"item {items.ids[int(np.argmin(items.labels))]} of {task.source!r} has no label; this "
            "task needs a source with labels."
        )
    distinct = len(set(items.content))
    if distinct < len(items):
        runner.warn(
            f"{len(items) - distinct} of {len(items)} items of {task.source} repeat the "
            f"{task.tower} input of an earlier one; every repetition counts."
        )
    return items, classes.of_labels(items.labels)
