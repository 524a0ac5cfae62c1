"""Cross-modal retrieval in both directions (CWCL Table 4): R@k and median rank.

An item may have several captions. For an image, any of its captions is correct; for a caption, only
its own image. Ranks are exact; `ranking` defines ties.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.ranking import both_match_ranks
from cwcl_jax.evaluation.zero_shot import normalise


def retrieval_ranks(
    items: Float[np.ndarray, "n d"],
    captions: Float[np.ndarray, "m d"],
    owner: Int[np.ndarray, "k"],
    of_items: Int[np.ndarray, "n"] | None = None,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Returns the ranks of item -> caption and of caption -> item.

    `owner[j]` is the item of caption j, or one of `of_items` if several items share captions.
    """
    if len(owner) != len(captions):
        raise ValueError(f"{len(captions)} captions but {len(owner)} owners.")
    of_items = np.arange(len(items)) if of_items is None else of_items
    alone = np.flatnonzero(~np.isin(of_items, owner))
    if len(alone):
        raise ValueError(
            f"{len(alone)} of {len(items)} items have no caption (the first: item {alone[0]}); "
            "leave them out of the retrieval set."
        )
    return both_match_ranks(
        normalise(items),
        normalise(captions),
        np.asarray(of_items, np.int64),
        np.asarray(owner, np.int64),
    )


def shared_groups(
    first: Int[np.ndarray, "n"], second: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """Returns the group of every pair; pairs that share a member on a side are one group."""
    groups = np.arange(len(first))
    while True:
        before = groups
        for side in (first, second):
            smallest = np.full(int(side.max()) + 1, len(groups))
            np.minimum.at(smallest, side, groups)
            groups = smallest[side]
        if (groups == before).all():
            return np.unique(groups, return_inverse=True)[1].ravel()


def reachable_ranks(
    captions: Sequence[str], owner: Int[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Returns the ranks that a model that knows every caption can reach.

    The two arrays are the ranks of item -> caption and of caption -> item.

    Equal captions have equal embeddings: of the items that share one, the first is ranked first. An
    item with several captions may be closest to the one that the fewest items before it have.
    `owner` is ascending, as in `retrieval_ranks`.
    """
    codes = np.unique(np.asarray(captions), return_inverse=True)[1].ravel()
    pairs, place, counts = np.unique(
        np.stack([codes, owner], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    first = np.searchsorted(pairs[:, 0], pairs[:, 0])  # the first item with the same caption
    before = np.cumsum(counts) - counts
    to_item = (1 + np.arange(len(pairs)) - first)[place.ravel()]
    to_caption = np.full(int(owner.max()) + 1, len(captions))
    np.minimum.at(to_caption, owner, (1 + before - before[first])[place.ravel()])
    return to_caption, to_item


def recall_metrics(ranks: Int[np.ndarray, "n"], direction: str, ks: Sequence[int]) -> dict:
    """Returns `image_to_text_R@1` and so on, with the median and the mean rank."""
    metrics = {f"{direction}_R@{k}": float(np.mean(ranks <= k)) for k in ks}
    metrics[f"{direction}_median_rank"] = float(np.median(ranks))
    metrics[f"{direction}_mean_rank"] = float(np.mean(ranks))
    return metrics


def recall_chance(
    relevant: Int[np.ndarray, "n"], candidates: int, direction: str, ks: Sequence[int]
) -> dict[str, float]:
    """Returns the expected R@k of a random order; query i has `relevant[i]` correct candidates."""
    return {f"{direction}_R@{k}": float(np.mean(1.0 - _miss(relevant, candidates, k))) for k in ks}


def _miss(relevant: Int[np.ndarray, "n"], candidates: int, k: int) -> Float[np.ndarray, "n"]:
    """Returns the probability that none of the first k of a random order is relevant."""
    miss = np.ones(len(relevant))
    for drawn in range(min(k, candidates)):
        miss *= np.maximum(candidates - relevant - drawn, 0) / (candidates - drawn)
    return miss
