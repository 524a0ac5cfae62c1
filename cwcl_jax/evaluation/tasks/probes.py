"""The tasks linear_probe and few_shot: a ridge classifier on frozen features."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.class_names import resolve_classes
from cwcl_jax.evaluation.probe import few_shot_subset, fit_ridge, score_ranks
from cwcl_jax.evaluation.ranking import NEVER
from cwcl_jax.evaluation.results import Record, TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals
from cwcl_jax.evaluation.tables import Table, metric_cells
from cwcl_jax.evaluation.tasks.base import at_least, not_empty, one_of
from cwcl_jax.evaluation.tasks.labelled import Cropped, Labelled, classified_items
from cwcl_jax.evaluation.zero_shot import classification_chance, classification_metrics

FEATURES = ("embeds", "features")
Part = tuple[Float[np.ndarray, "_ f"], Int[np.ndarray, "_"]]  # features and labels
Measured = tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Probe(Cropped, Labelled):
    """What linear_probe and few_shot share."""

    tower: str = "image"
    train_source: str = ""
    features: str = "embeds"  # embeds | features (before the projection head)
    top_k: tuple[int, ...] = (1, 5)  # 1 is always included

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("features", self.features, FEATURES)
        at_least(1, self, "top_k")
        if 1 not in self.top_k:
            object.__setattr__(self, "top_k", (1, *self.top_k))

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        super().check(towers, cache_dir)
        train = self.opened("train_source", cache_dir)
        resolve_classes(train.class_names, replace(self, source=self.train_source))

    def run(self, name: str, runner: Runner) -> TaskResult:
        return run_probe(name, self, runner)

    @abstractmethod
    def measure(self, train: Part, test: Part, count: int) -> Measured:
        """Returns metrics, hits of each item for the intervals, and values per item.

        Args:
          train: features and labels for fitting.
          test: features and labels for testing.
          count: number of classes.
        """

    @classmethod
    def tables(cls, results: Sequence[TaskResult]) -> list[Table]:
        return [_table(results)]

    def records(self, result: TaskResult) -> list[Record]:
        return [Record("linear_probe", "", {key: key for key in result.metrics})]


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Fits all training examples."""

    def measure(self, train: Part, test: Part, count: int) -> Measured:
        ranks, penalty = _fit_and_rank(train, test, count)
        metrics = classification_metrics(ranks, test[1], class_count=count, top_k=self.top_k)
        hits = {f"top{k}": ranks <= k for k in self.top_k}
        return metrics | {"penalty": penalty}, hits, {"rank": ranks}


@dataclass(frozen=True)
class FewShot(Probe):
    """Fits a few training examples of every class, drawn several times."""

    shots: tuple[int, ...] = (1, 5, 10)
    repeats: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "shots", "repeats")
        not_empty(self, "shots")

    def measure(self, train: Part, test: Part, count: int) -> Measured:
        """Returns means over `repeats` draws of the training examples, and standard deviations."""
        metrics: dict[str, float] = {}
        hits: dict[str, np.ndarray] = {}
        for shots in self.shots:
            ranks = []
            for repeat in range(self.repeats):
                rng = np.random.default_rng((self.seed, shots, repeat))
                chosen = few_shot_subset(train[1], shots, rng)
                ranks.append(_fit_and_rank((train[0][chosen], train[1][chosen]), test, count)[0])
            for k in self.top_k:
                right = np.stack(ranks) <= k
                metrics[f"top{k}_shots{shots}"] = float(right.mean())
                # An item's share of draws that get it right: the bootstrap over items resamples
                # this.
                hits[f"top{k}_shots{shots}"] = right.mean(axis=0)
                spread = float(right.mean(axis=1).std(ddof=len(right) > 1))
                metrics[f"std_top{k}_shots{shots}"] = spread
        return metrics, hits, {f"hit_{key}": value for key, value in hits.items()}


def run_probe(name: str, task: Probe, runner: Runner) -> TaskResult:
    """Returns the result of fitting `train_source` and testing `source`, with equal classes."""
    if not task.train_source:
        raise ValueError(f"a {task.kind} task needs train_source, a labelled source.")
    trained, train_labels, train_classes = classified_items(
        replace(task, source=task.train_source), runner, output=task.features
    )
    tested, test_labels, classes = classified_items(task, runner, output=task.features)
    if train_classes.names != classes.names:
        raise ValueError(
            f"train_source={task.train_source!r} and source={task.source!r} have different classes "
            "or a different order; give both the same class_names."
        )
    fitted = set(trained.content)
    if known := sum(key in fitted for key in tested.content):
        runner.warn(
            f"{known} of {len(tested)} test items have the same {task.tower} input as an item that "
            "the classifier was fitted to."
        )
    train, test = (trained.embeds, train_labels), (tested.embeds, test_labels)
    count = len(classes.names)
    missing = np.setdiff1d(test_labels, train_labels)
    if len(missing):
        runner.warn(
            f"{len(missing)} class(es) have no training example, e.g. "
            f"{classes.titles[missing[0]]!r}: their items count as wrong."
        )
    metrics, hits, ranks = task.measure(train, test, count)
    levels = classification_chance(test_labels, np.unique(train_labels), task.top_k)
    chance = {key: levels[key.partition("_shots")[0]] for key in metrics if _is_share(key)}
    return TaskResult(
        name=name,
        task=task,
        metrics=metrics,
        chance=chance,
        intervals=bootstrap_intervals(hits, task),
        items={
            "ids": np.asarray(tested.ids),
            "labels": test_labels,
            "top_k": np.asarray(task.top_k),
        }
        | ranks,
        extras={"class_names": classes.titles},
    )


def _fit_and_rank(train: Part, test: Part, count: int) -> tuple[Int[np.ndarray, "n"], float]:
    """Returns the test ranks and the penalty.

    Classes without training examples are not candidates: their items are never right.
    """
    seen = np.unique(train[1])
    ridge = fit_ridge(train[0], np.searchsorted(seen, train[1]), len(seen))
    scores = np.full((len(test[0]), count), -np.inf)
    scores[:, seen] = ridge.scores(np.asarray(test[0], np.float64))
    ranks = score_ranks(scores, test[1])
    return np.where(np.isin(test[1], seen), ranks, NEVER), ridge.penalty


def _is_share(key: str) -> bool:
    return key.startswith(("top", "mean_per_class"))


def _table(results: Sequence[TaskResult]) -> Table:
    rows = [
        (result.name, result.kind.replace("_", " "), key, *metric_cells(result, key, first=True))
        for result in results
        for key in result.metrics
        if key in result.chance
    ]
    header = ("task", "kind", "metric", "value %", "interval", "chance")
    return Table("Linear classifiers on frozen features", header, tuple(rows))
