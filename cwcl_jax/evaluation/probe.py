"""Linear classifiers on frozen features: ridge regression in closed form.

The penalty minimises the squared leave-one-out error, which needs no held-out data and is defined
even for a single example per class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Penalties, as multiples of the mean eigenvalue of X^T X.
PENALTIES = tuple(float(p) for p in np.logspace(-5, 3, 17))
# Number of rows processed at a time, and of rows that the leave-one-out error is computed over.
_ROWS = 4096


@dataclass(frozen=True)
class Ridge:
    """A linear classifier: scores = (x - mean) @ weights + bias; the highest score is the class."""

    mean: Float[np.ndarray, "f"]
    weights: Float[np.ndarray, "f c"]
    bias: Float[np.ndarray, "c"]
    penalty: float

    def scores(self, x: Float[np.ndarray, "n f"]) -> Float[np.ndarray, "n c"]:
        return (x - self.mean) @ self.weights + self.bias


def fit_ridge(
    x: Float[np.ndarray, "n f"],
    labels: Int[np.ndarray, "n"],
    class_count: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> Ridge:
    """Returns the least-squares fit to one-hot targets, with the best of `penalties`.

    The fit has an intercept.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} training example(s): a linear probe needs two or more.")
    mean, gram, sums = _moments(x, labels, class_count)
    bias = np.bincount(labels, minlength=class_count) / len(x)
    values, vectors = _spectrum(x, mean, gram)
    scale = max(float(np.sum(values)) / x.shape[1], np.finfo(np.float64).tiny)
    towards = vectors.T @ sums
    rows = np.random.default_rng(0).permutation(len(x))[:_ROWS]
    rotated, targets = (x[rows] - mean) @ vectors, np.eye(class_count)[labels[rows]] - bias
    errors = [
        _leave_one_out(rotated, towards, targets, values + p * scale, len(x)) for p in penalties
    ]
    penalty = float(penalties[int(np.argmin(errors))])
    weights = vectors @ (towards / (values + penalty * scale)[:, None])
    return Ridge(mean, weights, bias, penalty)


def _moments(
    x: Float[np.ndarray, "n f"], labels: Int[np.ndarray, "n"], class_count: int
) -> tuple[Float[np.ndarray, "f"], Float[np.ndarray, "f f"] | None, Float[np.ndarray, "f c"]]:
    """Returns mean, X^T X and X^T Y of centred features and targets, without copying `x`.

    X^T X is None unless it is the smaller Gram matrix.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    wide = len(x) < x.shape[1]
    gram = None if wide else np.zeros((x.shape[1], x.shape[1]))
    sums = np.zeros((class_count, x.shape[1]))
    for start in range(0, len(x), _ROWS):
        centred = x[start : start + _ROWS] - mean
        np.add.at(sums, labels[start : start + _ROWS], centred)
        if gram is not None:
            gram += centred.T @ centred
    return mean, gram, sums.T


def _spectrum(
    x: Float[np.ndarray, "n f"],
    mean: Float[np.ndarray, "f"],
    gram: Float[np.ndarray, "f f"] | None,
) -> tuple[Float[np.ndarray, "r"], Float[np.ndarray, "f r"]]:
    """Returns eigenvalues and eigenvectors of X^T X, computed from X X^T if that is smaller."""
    if gram is not None:
        values, vectors = np.linalg.eigh(gram)
        return np.maximum(values, 0.0), vectors
    centred = x - mean
    values, left = np.linalg.eigh(centred @ centred.T)
    some = values > values[-1] * 1e-12
    vectors = centred.T @ left[:, some] / np.sqrt(values[some])
    return values[some], vectors


def _leave_one_out(
    rotated: Float[np.ndarray, "m r"],
    towards: Float[np.ndarray, "r c"],
    targets: Float[np.ndarray, "m c"],
    damped: Float[np.ndarray, "r"],
    n: int,
) -> float:
    """Returns the mean squared error of rows left out one at a time: residual / (1 - leverage)."""
    fitted = rotated @ (towards / damped[:, None])
    leverage = np.sum(rotated**2 / damped, axis=1) + 1.0 / n
    residual = (targets - fitted) / np.maximum(1.0 - leverage, 1e-9)[:, None]
    return float(np.mean(residual**2))


def score_ranks(
    scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """Returns the rank (from 1) of every row's true class; ties go to the lower class index."""
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    return 1 + np.sum(np.where(earlier, scores >= own, scores > own), axis=1)


def few_shot_subset(
    labels: Int[np.ndarray, "n"], shots: int, rng: np.random.Generator
) -> Int[np.ndarray, "k"]:
    """Returns the indices of `shots` random examples of every class."""
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    small = min(len(group) for group in groups)
    if small < shots:
        raise ValueError(f"shots={shots}, but a class of train_source has only {small} examples.")
    return np.concatenate([rng.choice(group, shots, replace=False) for group in groups])
