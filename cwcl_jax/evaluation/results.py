"""Results of a task: metrics with their chance levels and intervals, and values per item."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cwcl_jax.evaluation.tasks.base import Task


@dataclass(frozen=True)
class TaskResult:
    """The result of one task. Shares are in 0..1 everywhere; only the tables print percent."""

    name: str
    task: Task
    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    # Values per item, by metric or by name ("ids", "labels"), for paired tests and per-class rows.
    items: dict[str, np.ndarray] = field(default_factory=dict)
    # Drawable or tabular extras, by name: "matrix", "per_class", ...
    extras: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    in_distribution: str = ""
    # Fingerprints of the data that the result was computed from, by source line.
    data: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.task.kind

    def flat(self) -> dict[str, float]:
        """Returns the metrics as `task/metric`, for the training log."""
        return {f"{self.name}/{key}": value for key, value in self.metrics.items()}


@dataclass(frozen=True)
class Record:
    """One entry of results.json: CLIP_benchmark's task, and its metric names -> ours."""

    task: str
    prompts: str
    metrics: Mapping[str, str]
