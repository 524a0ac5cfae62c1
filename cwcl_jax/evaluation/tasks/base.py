"""What an evaluation task is: its own fields, a check, a run, and how its results are shown.

A kind of task is one class in one file. The package's kinds are in `KINDS`. A user's kind is named
`"module:Class"`: a class that derives from `Task` in an importable module.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cwcl_jax.evaluation.results import Record, TaskResult
from cwcl_jax.evaluation.tables import Table
from cwcl_jax.evaluation.tasks.former import in_todays_fields
from cwcl_jax.extension import import_named

if TYPE_CHECKING:
    from cwcl_jax.data.sources import Source
    from cwcl_jax.evaluation.encoding import View
    from cwcl_jax.evaluation.runner import Runner

# Imported when a config names them.
KINDS = {
    "zero_shot": "cwcl_jax.evaluation.tasks.zero_shot:ZeroShot",
    "intent": "cwcl_jax.evaluation.tasks.spoken:Intent",
    "keywords": "cwcl_jax.evaluation.tasks.spoken:Keywords",
    "retrieval": "cwcl_jax.evaluation.tasks.retrieval:Retrieval",
    "alignment": "cwcl_jax.evaluation.tasks.alignment:Alignment",
    "linear_probe": "cwcl_jax.evaluation.tasks.probes:LinearProbe",
    "few_shot": "cwcl_jax.evaluation.tasks.probes:FewShot",
}
_USUAL_KIND = "zero_shot"


@dataclass(frozen=True)
class Task(ABC):
    """The fields of every task; a kind adds its own fields and defines how it runs.

    Embeddings come from `Runner`. Values per item named `rank...` and `hit_...` in
    `TaskResult.items`, together with `ids`, take part in paired tests between two runs.
    """

    kind: str = ""  # "" = that of the class
    source: str = ""  # a source specification, as in data.train
    tower: str = ""  # the tower whose items are evaluated
    max_items: int = 0  # 0 = all; otherwise this many, spread evenly over the source

    # Uncertainty.
    bootstrap: int = 1000  # resamples for the intervals; 0 = none
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.kind:
            object.__setattr__(self, "kind", _kind_of(type(self)))
        elif task_class(self.kind) is not type(self):
            raise ValueError(f"kind={self.kind!r} is not a {type(self).__name__}")
        at_least(0, self, "max_items", "bootstrap", "seed")
        if not 0.0 < self.confidence < 1.0:
            raise ValueError(
                f"task field confidence={self.confidence}: give a fraction between 0 and 1, e.g. "
                "0.95."
            )

    @classmethod
    def variant(cls, given: Mapping[str, Any]) -> tuple[type[Task], dict[str, Any]]:
        """Returns the class of a task with the fields `given`, and the fields by current names.

        Raises:
          ValueError: the kind does not exist or is not a task, or a field belongs to other kinds.
        """
        kind = given.get("kind") or (_USUAL_KIND if cls is Task else _kind_of(cls))
        chosen = task_class(kind)
        if not issubclass(chosen, cls):
            raise ValueError(f"kind={kind!r} is a {chosen.__name__}, not a {cls.__name__}")
        known = {field.name for field in fields(chosen)}
        return chosen, {**in_todays_fields(given, known, kind), "kind": kind}

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        """Opens what the task names, without reading an example.

        Args:
          towers: names of the model's towers.
          cache_dir: `data.cache_dir`.

        Raises:
          ValueError or FileNotFoundError: the task cannot run; the message names the field.
        """
        self.require_tower("tower", towers)
        self.opened("source", cache_dir)

    @abstractmethod
    def run(self, name: str, runner: Runner) -> TaskResult:
        """Evaluates the encoder of `runner` and returns the result; `name` is the task's name.

        Warnings and times need not be in the result: they are taken from `runner`.
        """

    @classmethod
    def tables(cls, results: Sequence[TaskResult]) -> list[Table]:
        """Returns tables for all tasks that inherit this method from the same class."""
        rows = []
        for result in results:
            for key, value in result.metrics.items():
                interval = "-".join(f"{end:.4g}" for end in result.intervals.get(key, ()))
                chance = f"{result.chance[key]:.4g}" if key in result.chance else ""
                rows.append((result.name, result.kind, key, f"{value:.4g}", interval, chance))
        header = ("task", "kind", "metric", "value", "interval", "chance")
        return [Table("Further tasks", header, tuple(rows))]

    @classmethod
    def published(cls, results: Sequence[TaskResult]) -> list[Table]:
        """Returns tables of published numbers to compare `results` with; they follow all others."""
        del results
        return []

    def records(self, result: TaskResult) -> list[Record]:
        """Returns the records of a result in results.json; by default one, under its own names."""
        return [Record(self.kind, "", {key: key for key in result.metrics})]

    def open(self, runner: Runner) -> View:
        """Returns the examples of `source`, at most `max_items`, drawn evenly by `seed`."""
        return runner.open(self.source, max_items=self.max_items, seed=self.seed)

    def require_tower(self, field: str, towers: Collection[str]) -> None:
        """Raises ValueError if `field` names a tower that the model does not have."""
        name = getattr(self, field)
        if name not in towers:
            raise ValueError(
                f"the model has no {name!r} tower for this {self.kind} task; it has "
                f"{sorted(towers)}: set {field} to one of them"
            )

    def opened(self, field: str, cache_dir: str) -> Source:
        """Returns the source that `field` names; a ValueError names the field."""
        # Imported here, so that settings can be read without the data libraries.
        from cwcl_jax.data.sources import open_source

        line = getattr(self, field)
        if not line:
            raise ValueError(f"{field} is empty; name a source, such as scenes:test?task=shape")
        try:
            return open_source(line, cache_dir=cache_dir)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{field}={line!r}: {error}") from error


def task_class(kind: str) -> type[Task]:
    """Returns the class of a kind, one of `KINDS` or the user's "module:Class".

    Raises:
      ValueError: the kind does not exist, or its class is not a dataclass derived from `Task`.
    """
    if kind not in KINDS and ":" not in kind:
        near = difflib.get_close_matches(kind, KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"kind={kind!r} is not known; did you mean {near!r}? (kinds: {', '.join(KINDS)}, or "
            "'module:Class' for one of your own)"
        )
    found = import_named(KINDS.get(kind, kind), "evaluation task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"kind={kind!r} does not name a class that derives from {Task.__name__}")
    if "__dataclass_fields__" not in vars(found) or found is Task:
        raise ValueError(f"kind={kind!r}: decorate the class with @dataclass(frozen=True)")
    return found


def _kind_of(cls: type[Task]) -> str:
    reference = f"{cls.__module__}:{cls.__qualname__}"
    return next((kind for kind, known in KINDS.items() if known == reference), reference)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raises ValueError unless the value of a field is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"task field {name}={value!r} is not known; use one of {list(allowed)}.")


def at_least(least: int, task: Task, *names: str) -> None:
    """Raises ValueError if a field's number, or one of its numbers, is smaller than `least`."""
    for name in names:
        value = getattr(task, name)
        if isinstance(value, tuple) and any(k < least for k in value):
            raise ValueError(f"task field {name}={value!r}: every number must be at least {least}.")
        if not isinstance(value, tuple) and value < least:
            raise ValueError(f"task field {name}={value}: must be at least {least}.")


def not_empty(task: Task, *names: str) -> None:
    """Raises ValueError if a field is empty."""
    for name in names:
        if not getattr(task, name):
            raise ValueError(f"task field {name} is empty; give a number, such as (1,).")
