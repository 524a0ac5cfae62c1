"""The tasks linear_probe and few_shot: a ridge classifier on frozen features."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.classification import classified_items
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.evaluation.probe import few_shot_subset, fit_ridge, score_ranks
from cwcl_jax.evaluation.ranking import NEVER
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals
from cwcl_jax.evaluation.zero_shot import classification_chance, classification_metrics

_Part = tuple[Float[np.ndarray, "_ f"], Int[np.ndarray, "_"]]  # features and labels


def run_probe(name: str, task: TaskConfig, runner: Runner) -> TaskResult:
    """Trains on `train_source`, tests on `source`; both need the same classes."""
    if not task.train_source:
        raise ValueError(f"a {task.kind} task needs train_source, a labelled source.")
    trained, train_labels, train_classes = classified_items(
        replace(task, source=task.train_source), runner
    )
    tested, test_labels, classes = classified_items(task, runner)
    if train_classes.names != classes.names:
        raise ValueError(
            f"train_source={task.train_source!r} and source={task.source!r} have other classes or "
            "another order; give both the same class_names."
        )
    train, test = (trained.embeds, train_labels), (tested.embeds, test_labels)
    count = len(classes.names)
    missing = np.setdiff1d(test_labels, train_labels)
    if len(missing):
        runner.warn(
            f"{len(missing)} class(es) have no training example, e.g. "
            f"{classes.titles[missing[0]]!r}: their items count as wrong."
        )
    if task.kind == "few_shot":
        metrics, hits, ranks = _few_shot(train, test, count, task)
    else:
        metrics, hits, ranks = _linear_probe(train, test, count, task)
    levels = classification_chance(test_labels, np.unique(train_labels), task.top_k)
    chance = {key: levels[key.partition("_shots")[0]] for key in metrics if _is_share(key)}
    return TaskResult(
        name=name,
        kind=task.kind,
        source=task.source,
        metrics=metrics,
        chance=chance,
        intervals=bootstrap_intervals(hits, task),
        items={"ids": np.asarray(tested.ids), "labels": test_labels} | ranks,
        extras={"class_names": classes.titles},
        warnings=tuple(runner.warnings),
        seconds=dict(runner.clock.seconds),
    )


def _linear_probe(
    train: _Part, test: _Part, count: int, task: TaskConfig
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    ranks, penalty = _fit_and_rank(train, test, count)
    metrics = classification_metrics(ranks, test[1], class_count=count, top_k=task.top_k)
    hits = {f"top{k}": ranks <= k for k in task.top_k}
    return metrics | {"penalty": penalty}, hits, {"rank": ranks}


def _few_shot(
    train: _Part, test: _Part, count: int, task: TaskConfig
) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Mean over `task.repeats` draws of the training examples, and their standard deviation."""
    metrics: dict[str, float] = {}
    hits: dict[str, np.ndarray] = {}
    for shots in task.shots:
        ranks = []
        for repeat in range(task.repeats):
            rng = np.random.default_rng((task.seed, shots, repeat))
            chosen = few_shot_subset(train[1], shots, rng)
            ranks.append(_fit_and_rank((train[0][chosen], train[1][chosen]), test, count)[0])
        for k in task.top_k:
            right = np.stack(ranks) <= k
            metrics[f"top{k}_shots{shots}"] = float(right.mean())
            # An item's share of right draws: what the bootstrap over items resamples.
            hits[f"top{k}_shots{shots}"] = right.mean(axis=0)
            metrics[f"std_top{k}_shots{shots}"] = float(right.mean(axis=1).std(ddof=len(right) > 1))
    return metrics, hits, {f"hit_{key}": value for key, value in hits.items()}


def _fit_and_rank(train: _Part, test: _Part, count: int) -> tuple[Int[np.ndarray, "n"], float]:
    """Classes without training examples are no candidates: their items are never right."""
    seen = np.unique(train[1])
    ridge = fit_ridge(train[0], np.searchsorted(seen, train[1]), len(seen))
    scores = np.full((len(test[0]), count), -np.inf)
    scores[:, seen] = ridge.scores(np.asarray(test[0], np.float64))
    ranks = score_ranks(scores, test[1])
    return np.where(np.isin(test[1], seen), ranks, NEVER), ridge.penalty


def _is_share(key: str) -> bool:
    return key.startswith(("top", "mean_per_class"))
