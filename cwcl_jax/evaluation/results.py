"""What a task returns: metrics with their chance levels and intervals, and values per item."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TaskResult:
    """The outcome of one task. Shares are in 0..1 everywhere; only the tables print percent."""

    name: str
    kind: str
    source: str
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

    def flat(self) -> dict[str, float]:
        """Metrics as `task/metric`, for the training log."""
        return {f"{self.name}/{key}": value for key, value in self.metrics.items()}
