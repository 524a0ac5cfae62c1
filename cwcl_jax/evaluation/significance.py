"""Statistical significance: bootstrap intervals of one run, and paired tests between two.

Both resample items (or groups of items that belong together, such as the captions of a picture or
the recordings of a speaker). Neither says anything about other training seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Num, Shaped
from scipy import stats

from cwcl_jax.evaluation.tasks.base import Task

# Number of values resampled at a time: 32 MiB of float64.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PairedTest:
    """The result of a paired test: run B is compared with run A on the same items.

    `difference` is B minus A, with its `interval`. `p_value` is two-sided.
    """

    mean_a: float
    mean_b: float
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    items: int


def bootstrap_interval(
    values: Shaped[np.ndarray, "n"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Int[np.ndarray, "n"] | None = None,
) -> tuple[float, float]:
    """Returns the percentile interval of the mean; `groups` are resampled as a whole."""
    sums, counts = _by_group(values, groups)
    if len(sums) == 1:
        mean = float(sums[0] / counts[0])
        return mean, mean
    found = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        n_resamples=resamples,
        batch=max(1, _CHUNK // len(sums)),
        paired=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def bootstrap_intervals(
    hits: Mapping[str, Shaped[np.ndarray, "n"]],
    task: Task,
    *,
    groups: Int[np.ndarray, "n"] | None = None,
) -> dict[str, tuple[float, float]]:
    """Returns the intervals of metrics that are means over items, with the task's settings."""
    if not task.bootstrap:
        return {}
    return {
        name: bootstrap_interval(
            values,
            resamples=task.bootstrap,
            confidence=task.confidence,
            seed=task.seed,
            groups=groups,
        )
        for name, values in hits.items()
    }


def paired_test(
    a: Shaped[np.ndarray, "n"],
    b: Shaped[np.ndarray, "m"],
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    groups: Int[np.ndarray, "n"] | None = None,
) -> PairedTest:
    """Compares the means of two runs item by item and returns the test.

    Right/wrong values of independent items get McNemar's exact test; other values, or groups, get a
    sign-flip test. The interval of the difference is a paired bootstrap.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"the runs have {len(a)} and {len(b)} items: a paired test needs the same ones."
        )
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    interval = bootstrap_interval(
        b - a, resamples=resamples, confidence=confidence, seed=seed, groups=groups
    )
    binary = bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all())
    if binary and groups is None:
        test, p_value = "McNemar, exact", mcnemar(int(np.sum(a > b)), int(np.sum(b > a)))
    else:
        test, p_value = "sign flips", _sign_flip(b - a, groups, resamples, seed)
    mean_a, mean_b = float(a.mean()), float(b.mean())
    return PairedTest(mean_a, mean_b, mean_b - mean_a, interval, p_value, test, len(a))


def mcnemar(only_a: int, only_b: int) -> float:
    """Returns the two-sided exact p-value: items that only one run gets right are fair coins."""
    n = only_a + only_b
    if n == 0:
        return 1.0
    return float(stats.binomtest(only_a, n).pvalue)


def _by_group(
    values: Shaped[np.ndarray, "n"], groups: Int[np.ndarray, "n"] | None
) -> tuple[Float[np.ndarray, "g"], Num[np.ndarray, "g"]]:
    """Returns the sum of the values and the number of items of every group (or of every item)."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no items to resample.")
    if groups is None:
        return values, np.ones(len(values))
    number = np.unique(groups, return_inverse=True)[1]
    return np.bincount(number, weights=values), np.bincount(number).astype(np.float64)


def _sign_flip(
    difference: Float[np.ndarray, "n"],
    groups: Int[np.ndarray, "n"] | None,
    resamples: int,
    seed: int,
) -> float:
    """Returns the share of random sign patterns with a mean as far from 0 as the observed."""
    sums, _ = _by_group(difference, groups)
    rng, n, reached = np.random.default_rng(seed), len(sums), 0
    observed = abs(sums.sum())
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        signs = rng.integers(0, 2, (min(at_once, resamples - start), n)) * 2.0 - 1.0
        reached += int(np.sum(np.abs(signs @ sums) >= observed - 1e-12))
    return (reached + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p-values corrected for their number by Holm's method, in the given order."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[int(at)] = highest
    return corrected


def seed_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Returns the mean over two or more training seeds and its 95 % interval (Student's t)."""
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds: an interval over seeds needs at least 2.")
    mean, scale = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * scale
    return mean, (mean - half, mean + half)
