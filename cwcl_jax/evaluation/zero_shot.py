"""Zero-shot classification by class embeddings, as in CWCL section 4 and A.2.2.

A class embedding is the normalised mean of the normalised embeddings of its prompts. An item
belongs to the class whose embedding has the highest cosine with the item's embedding.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.ranking import TIE, first_match_ranks

_EPS = 1e-12


def normalise(x: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "... d"]:
    """Returns rows of unit norm, as float32; a zero row stays zero."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), _EPS)


def class_embeds(
    prompt_embeds: Float[np.ndarray, "p d"], prompts_per_class: Sequence[int]
) -> Float[np.ndarray, "c d"]:
    """Returns class embeddings (c, d) from the embeddings of all prompts, those of class 0 first.

    A class without prompts gets a zero row; the caller excludes it from the candidates (`usable`).
    """
    counts = np.asarray(prompts_per_class, np.int64)
    if counts.sum() != len(prompt_embeds):
        raise ValueError(
            f"{len(prompt_embeds)} prompt embeddings, but the classes have {counts.sum()} prompts."
        )
    sums = np.zeros((len(counts), prompt_embeds.shape[1]), np.float64)
    np.add.at(sums, np.repeat(np.arange(len(counts)), counts), normalise(prompt_embeds))
    return normalise(sums / np.maximum(counts, 1)[:, None])


def label_ranks(
    embeds: Float[np.ndarray, "n d"],
    classes: Float[np.ndarray, "c d"],
    labels: Int[np.ndarray, "k"],
    usable: Int[np.ndarray, "u"] | None = None,
) -> Int[np.ndarray, "n"]:
    """Returns the rank (from 1) of every item's true class among the `usable` classes."""
    candidates = np.arange(len(classes)) if usable is None else usable
    if len(labels) != len(embeds):
        raise ValueError(f"{len(embeds)} items but {len(labels)} labels.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but there are {len(classes)} "
            "classes: the class list and the labels do not belong together."
        )
    return first_match_ranks(normalise(embeds), classes[candidates], labels, candidates)


def predict(
    embeds: Float[np.ndarray, "n d"],
    classes: Float[np.ndarray, "c d"],
    usable: Int[np.ndarray, "u"] | None = None,
) -> Int[np.ndarray, "n"]:
    """Returns the predicted class of every item; ties (see `ranking`) go to the lowest."""
    candidates = np.arange(len(classes)) if usable is None else usable
    predicted = np.empty(len(embeds), np.int64)
    for start in range(0, len(embeds), 4096):
        similar = normalise(embeds[start : start + 4096]) @ classes[candidates].T
        near = similar >= similar.max(axis=1, keepdims=True) - TIE
        predicted[start : start + 4096] = candidates[near.argmax(axis=1)]
    return predicted


def top_k_accuracy(ranks: Int[np.ndarray, "n"], k: int) -> float:
    """Returns the share of items whose true class is among the k most similar ones."""
    return float(np.mean(ranks <= k))


def per_class_recall(
    ranks: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"], class_count: int
) -> Float[np.ndarray, "c"]:
    """Returns the top-1 accuracy of each class; NaN for a class without items."""
    right = np.bincount(labels, weights=ranks == 1, minlength=class_count)
    items = np.bincount(labels, minlength=class_count)
    return np.divide(right, items, out=np.full(class_count, np.nan), where=items > 0)


def classification_metrics(
    ranks: Int[np.ndarray, "n"],
    labels: Int[np.ndarray, "n"],
    *,
    class_count: int,
    top_k: Sequence[int],
) -> dict[str, float]:
    """Returns the top-k accuracies, and the mean recall of the classes that have items."""
    metrics = {f"top{k}": top_k_accuracy(ranks, k) for k in top_k}
    metrics["mean_per_class_recall"] = float(
        np.nanmean(per_class_recall(ranks, labels, class_count))
    )
    return metrics


def classification_chance(
    labels: Int[np.ndarray, "n"], usable: Int[np.ndarray, "u"], top_k: Sequence[int]
) -> dict[str, float]:
    """Returns the scores of guessing among usable classes.

    Items of other classes are never right.
    """
    reachable = float(np.mean(np.isin(labels, usable)))
    chance = {f"top{k}": reachable * min(1.0, k / len(usable)) for k in top_k}
    reachable_classes = float(np.mean(np.isin(np.unique(labels), usable)))
    return chance | {"mean_per_class_recall": reachable_classes / len(usable)}


def per_class_report(
    ranks: Int[np.ndarray, "n"],
    labels: Int[np.ndarray, "n"],
    predicted: Int[np.ndarray, "n"],
    titles: Sequence[str],
) -> list[dict[str, object]]:
    """Returns one row per class, worst first: items, recall, precision, most frequent confusion."""
    count = len(titles)
    items = np.bincount(labels, minlength=count)
    taken = np.bincount(predicted, minlength=count)
    right = np.bincount(labels[predicted == labels], minlength=count)
    recall = per_class_recall(ranks, labels, count)
    rows = []
    for c in map(int, np.flatnonzero(items)):
        wrong = np.bincount(predicted[(labels == c) & (predicted != c)], minlength=count)
        rows.append(
            {
                "class": titles[c],
                "items": int(items[c]),
                "recall": float(recall[c]),
                "precision": float(right[c] / taken[c]) if taken[c] else float("nan"),
                "mistaken for": titles[int(wrong.argmax())] if wrong.any() else "",
                "times": int(wrong.max()),
            }
        )
    return sorted(rows, key=lambda row: (row["recall"], row["class"]))
