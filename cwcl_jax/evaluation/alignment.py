"""Measures how well two modalities are aligned: CWCL Figures 3, 7 and 8, as matrix and as numbers.

Besides block diagonality: the modality gap (Liang et al. 2022), alignment and uniformity (Wang &
Isola 2020), and two numbers about structure, i.e. the similarities among the items of one side:

    structure_between_modalities   of u and v: do both sides find the same pairs of items similar?
    structure_kept_by_projection   of p and u: does the projection of the side that gives the
                                   weights preserve the similarities of its encoder?
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.zero_shot import normalise
from cwcl_jax.files import replacing


def choose_items(
    labels: Int[np.ndarray, "n"], *, classes: int, items_per_class: int, seed: int
) -> Int[np.ndarray, "k"]:
    """Returns the indices of items of `classes` random classes, equally many each, sorted by class.

    The choice depends only on the labels and the seed, so two runs get the same items. Classes with
    `items_per_class` items are preferred. If there are too few of them, any class with two items
    may be chosen, and all classes get as many items as the smallest chosen one has.
    """
    names, counts = np.unique(labels, return_counts=True)
    enough = names[counts >= items_per_class]
    if len(enough) < classes:
        enough = names[counts >= 2]
    if len(enough) < classes:
        raise ValueError(
            f"only {len(enough)} classes have two items or more, but classes={classes}; lower it."
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(enough, classes, replace=False))
    each = min(items_per_class, *(int(np.sum(labels == c)) for c in chosen))
    picked = [np.sort(rng.permutation(np.flatnonzero(labels == c))[:each]) for c in chosen]
    return np.concatenate(picked)


def block_diagonality(
    matrix: Float[np.ndarray, "n n"], labels: Int[np.ndarray, "n"]
) -> dict[str, float]:
    """Returns the mean similarity within and between classes, and their difference.

    Row i and column i belong to one item. `block_diagonality_other_items` leaves these pairs out:
    it is zero for a model that only knows which text belongs to which item.
    """
    same = labels[:, None] == labels[None, :]
    others = same & ~np.eye(len(labels), dtype=bool)
    if same.all() or not others.any():
        raise ValueError("block diagonality needs pairs within a class and between classes.")
    within, between = float(matrix[same].mean()), float(matrix[~same].mean())
    return {
        "within_class": within,
        "between_class": between,
        "block_diagonality": within - between,
        "block_diagonality_other_items": float(matrix[others].mean()) - between,
    }


def pair_metrics(
    u: Float[np.ndarray, "n d"], v: Float[np.ndarray, "n d"], *, sample: int = 4096, seed: int = 0
) -> dict[str, float]:
    """Returns statistics of matching pairs (row i of `u` belongs to row i of `v`).

    modality_gap: distance of the two centroids; alignment: mean squared distance of pairs;
    pair_cosine: mean cosine of pairs;
    uniformity_u, uniformity_v: log mean exp(-2 squared distance) within a modality;
    structure_between_modalities: Pearson correlation of the cosines within u and those within v,
    over pairs i < j.
    The last three are computed from at most `sample` pairs.
    """
    u, v = normalise(u).astype(np.float64), normalise(v).astype(np.float64)
    metrics = {
        "modality_gap": float(np.linalg.norm(u.mean(axis=0) - v.mean(axis=0))),
        "alignment": float(np.mean(np.sum((u - v) ** 2, axis=1))),
        "pair_cosine": float(np.mean(np.sum(u * v, axis=1))),
    }
    if len(u) < 3:
        return metrics
    chosen = np.random.default_rng(seed).permutation(len(u))[:sample]
    upper = np.triu_indices(len(chosen), 1)
    u_cosines, v_cosines = (x[chosen] @ x[chosen].T for x in (u, v))
    metrics["uniformity_u"] = _uniformity(u_cosines[upper])
    metrics["uniformity_v"] = _uniformity(v_cosines[upper])
    if u_cosines[upper].std() > 0 and v_cosines[upper].std() > 0:
        correlation = np.corrcoef(u_cosines[upper], v_cosines[upper])[0, 1]
        metrics["structure_between_modalities"] = float(correlation)
    return metrics


def kept_by_projection(
    p: Float[np.ndarray, "n f"],
    u: Float[np.ndarray, "n d"],
    *,
    neighbours: int = 10,
    sample: int = 2048,
    seed: int = 0,
) -> dict[str, float]:
    """Returns how much of the similarities among the rows of `p` is preserved among those of `u`.

    structure_kept_by_projection: Spearman correlation of the cosines within p and within u, over
    pairs i < j; 1 without a projection.
    neighbours_kept_by_projection: share of an item's `neighbours` nearest items in p (all others,
    if there are fewer) that are among equally many nearest items in u, averaged over items.

    Args:
      p: output of the locked encoder.
      u: the same items, projected.
      sample: maximal number of items, drawn with `seed`.
    """
    from scipy import stats  # imported here: the import takes a second, and few commands need it

    chosen = np.random.default_rng(seed).permutation(len(p))[:sample]
    # Of tied items the lower index comes first. Rounding keeps float32 noise from breaking ties.
    p_cosines, u_cosines = (
        np.round(x @ x.T, 6) for x in (normalise(y[chosen]).astype(np.float64) for y in (p, u))
    )
    upper = np.triu_indices(len(chosen), 1)
    if len(chosen) < 3 or not (p_cosines[upper].std() and u_cosines[upper].std()):
        return {}
    near_p, near_u = (_nearest(cosines, neighbours) for cosines in (p_cosines, u_cosines))
    shares = [np.isin(a, b).mean() for a, b in zip(near_p, near_u, strict=True)]
    kept: Any = stats.spearmanr(p_cosines[upper], u_cosines[upper])  # its stubs declare no fields
    return {
        "structure_kept_by_projection": float(kept.statistic),
        "neighbours_kept_by_projection": float(np.mean(shares)),
    }


def _nearest(cosines: Float[np.ndarray, "n n"], count: int) -> Int[np.ndarray, "n k"]:
    """Returns the indices of the nearest other items of every item."""
    others = np.where(np.eye(len(cosines), dtype=bool), -np.inf, cosines)
    return np.argsort(-others, axis=1, kind="stable")[:, : min(count, len(cosines) - 1)]


def _uniformity(cosines: Float[np.ndarray, "p"]) -> float:
    # On the unit sphere the squared distance is 2 - 2 cos; this is exp(-2 |x-y|^2).
    return float(np.log(np.mean(np.exp(-2.0 * (2.0 - 2.0 * cosines)))))


def write_matrix(
    path: Path,
    matrix: Float[np.ndarray, "n m"],
    ids: Sequence[str],
    class_names: Sequence[str],
    column_ids: Sequence[str] | None = None,
) -> Path:
    """Writes the matrix as CSV (id and class of the row, one column per text); returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "class", *(column_ids or ids)])
        for name, label, row in zip(ids, class_names, matrix, strict=True):
            writer.writerow([name, label, *(f"{value:.6f}" for value in row)])
    return path
