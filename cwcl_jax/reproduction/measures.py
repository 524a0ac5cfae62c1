"""Metrics of a run, from the values per item that its evaluation saved, and over several seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.evaluation.compare import load_items
from cwcl_jax.evaluation.significance import seed_interval


def measure(folder: Path, task: str, metric: str) -> float:
    """Returns a share of a run's items, in per cent.

    Args:
      metric: an array of ranks among the task's items, and the largest rank that counts as correct:
          "rank@1", "rank_general@5", "image_to_text_rank@10"; or "block_diagonality".
    """
    items = load_items(folder)
    if task not in items:
        raise ValueError(f"{folder} has no results of the task {task!r}, only {sorted(items)}")
    if metric == "block_diagonality":
        classes = items[task]["matrix_classes"]
        same, matrix = classes[:, None] == classes[None, :], items[task]["matrix"]
        return 100 * float(matrix[same].mean() - matrix[~same].mean())
    name, _, limit = metric.partition("@")
    if name not in items[task]:
        raise ValueError(f"the task {task!r} in {folder} has no {name!r}: {sorted(items[task])}")
    return 100 * float(np.mean(items[task][name] <= int(limit)))


def recorded(folders: Iterable[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns all metrics that runs have recorded: run -> "task | prompts" -> metric -> value."""
    found = {}
    for folder in folders:
        records = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        found[folder.name] = {
            " | ".join(filter(None, (record["name"], record.get("prompts")))): {
                metric: round(value, 6) for metric, value in record["metrics"].items()
            }
            for record in records
        }
    return found


@dataclasses.dataclass(frozen=True)
class Spread:
    """A number over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 % interval of the mean; None for one seed, or if all seeds agree.

        Shares come in steps of one item. Seeds that agree to the item vary by less than a step, not
        by zero: an interval of width zero would claim more than they can show.
        """
        return None if len(set(self.values)) == 1 else seed_interval(self.values)[1]

    @property
    def half(self) -> float:
        """Half the interval's width; 0 without an interval."""
        return 0.0 if self.interval is None else (self.interval[1] - self.interval[0]) / 2

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.half:.2f}" if self.interval else "")


def difference(a: Spread, b: Spread) -> Spread:
    """Returns B minus A, seed by seed, rounded so that equal item counts give equal differences."""
    pairs = zip(a.values, b.values, strict=True)
    return Spread(tuple(round(y - x, 9) for x, y in pairs))


def verdict(change: Spread) -> str:
    """Returns what the seeds say about a difference."""
    if len(change.values) == 1:
        return "one seed: no conclusion"
    if change.interval is None:
        return "the same in every seed: no interval"
    low, high = change.interval
    if low > 0:
        return "higher"
    return "lower" if high < 0 else "no difference shown"


def spread(folders: Sequence[Path], task: str, metric: str) -> Spread:
    """Returns a number over runs that differ only in their seed."""
    return Spread(tuple(measure(folder, task, metric) for folder in folders))
