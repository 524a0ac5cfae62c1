"""What to evaluate: the tasks of an experiment, and how often they run."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cwcl_jax.evaluation.tasks.base import Task

# Task names become file names and parts of settings.
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class EvaluationConfig:
    """The tasks of an experiment, and how often training runs them."""

    every_steps: int = 0  # 0 = only at the end of training
    batch_size: int = 256  # examples per encode call; the last batch is padded to it
    tasks: Mapping[str, Task] = field(default_factory=dict)
    # CSV of baseline models for effective robustness: task, in_distribution, shifted.
    robustness_baselines: str = ""

    def __post_init__(self) -> None:
        for name in self.tasks:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"evaluation.tasks: {name!r} cannot name a task (its files are named after "
                    "it); use letters, digits, '_', '-' and '.'."
                )
        if self.batch_size < 1:
            raise ValueError(f"evaluation.batch_size={self.batch_size}: must be at least 1.")
        if self.every_steps < 0:
            raise ValueError(f"evaluation.every_steps={self.every_steps}: must be 0 or more.")
