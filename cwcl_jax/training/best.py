"""Tracks the step with the best value of a logged metric, and ends runs that no longer improve.

Both depend only on the sequence of observed values. Their state is part of every checkpoint, so a
resumed run decides like an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cwcl_jax.config import ConfigError
from cwcl_jax.training.options import CheckpointConfig

# The measurements that provide metrics; see `kind_of`.
VALIDATION, EVALUATION, TRAINING = "validation", "evaluation", "training"


def kind_of(name: str) -> str:
    """Returns which measurement provides a metric: the step, the validation or the evaluation."""
    prefix = name.partition("/")[0].removesuffix("_ema")
    return prefix if prefix in (VALIDATION, EVALUATION) else TRAINING


class Best:
    """The best step so far, and how long ago it was.

    Attributes:
      value: the best value so far; None before the first.
      step: its step; None before the first.
      seen: the last step whose value was observed; 0 before the first.
      waited: number of values since the best one.
    """

    def __init__(self, config: CheckpointConfig, saved: Mapping[str, Any] | None = None):
        """Starts empty, or from a state that `state` returned.

        Args:
          saved: state from a checkpoint; ignored if it belongs to another metric.
        """
        self._name, _, self._direction = config.best.rpartition(":")
        self._patience = config.patience
        self.value: float | None = None
        self.step: int | None = None
        self.seen = self.waited = 0
        if saved and saved["name"] == config.best:
            self.value, self.step = saved["value"], saved["step"]
            self.seen, self.waited = saved["seen"], saved["waited"]

    @property
    def kind(self) -> str:
        """The measurement that provides the metric; "" if none is watched."""
        return kind_of(self._name) if self._name else ""

    @property
    def name(self) -> str:
        return self._name

    def state(self) -> dict[str, Any] | None:
        """Returns the state for a checkpoint, JSON-able; None if no metric is watched."""
        if not self._name:
            return None
        return {
            "name": f"{self._name}:{self._direction}",
            "value": self.value,
            "step": self.step,
            "seen": self.seen,
            "waited": self.waited,
        }

    def require(self, known: Mapping[str, Any], kind: str) -> None:
        """Raises ConfigError if the measurement `kind` should provide the metric but does not."""
        if kind == self.kind and self._name not in known:
            raise ConfigError(
                f"config.checkpoint.best={self._name}:{self._direction}: no such metric is "
                f"measured; there are {', '.join(sorted(known))}"
            )

    def observe(self, step: int, values: Mapping[str, float], kind: str) -> None:
        """Records the values of a measurement at a step; a step that was already seen is ignored.

        Raises:
          ConfigError: the metric is not among the values.
        """
        if kind != self.kind or step <= self.seen:
            return
        self.require(values, kind)
        value, self.seen = float(values[self._name]), step
        self.waited += 1
        if math.isfinite(value) and (self.value is None or self._is_better(value, self.value)):
            self.value, self.step, self.waited = value, step, 0

    def _is_better(self, value: float, than: float) -> bool:
        return value < than if self._direction == "min" else value > than

    @property
    def exhausted(self) -> bool:
        """Whether the run should end: `patience` values in a row were not better."""
        return bool(self._patience) and self.waited >= self._patience

    def told(self) -> str:
        """Returns a description of the best step; "" if there is none yet."""
        if self.step is None:
            return ""
        return f"{self._name} {self.value:.6g} at step {self.step}"
