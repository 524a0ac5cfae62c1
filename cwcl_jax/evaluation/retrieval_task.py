"""The retrieval task: a source of items with captions, ranked in both directions."""

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.encoding import Items, View
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.retrieval import (
    reachable_ranks,
    recall_chance,
    recall_metrics,
    retrieval_ranks,
)
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals


def run_retrieval(name: str, task: TaskConfig, runner: Runner) -> TaskResult:
    """R@k and median rank of item -> partner and partner -> item."""
    view = runner.open(task.source, task)
    items = runner.items(view, task.modality)
    partners, owner, captions = _partners(view, items, task, runner)
    forward, backward = f"{task.modality}_to_{task.partner}", f"{task.partner}_to_{task.modality}"
    to_partner, to_item = retrieval_ranks(items.embeds, partners, owner)
    metrics = recall_metrics(to_partner, forward, task.recall_k)
    metrics |= recall_metrics(to_item, backward, task.recall_k)
    once = np.ones(len(partners), np.int64)
    chance = recall_chance(np.bincount(owner), len(partners), forward, task.recall_k)
    chance |= recall_chance(once, len(items), backward, task.recall_k)
    hits = {f"{forward}_R@{k}": to_partner <= k for k in task.recall_k}
    back = {f"{backward}_R@{k}": to_item <= k for k in task.recall_k}
    reachable = _reachable(captions, owner, (forward, backward), task, runner)
    # The captions of one item are not independent of each other: they are drawn together.
    intervals = bootstrap_intervals(hits, task) | bootstrap_intervals(back, task, groups=owner)
    return TaskResult(
        name=name,
        kind=task.kind,
        source=task.source,
        metrics=metrics,
        chance=chance,
        intervals=intervals,
        items={
            "ids": np.asarray(items.ids),
            "owner": owner,
            f"{forward}_rank": to_partner,
            f"{backward}_rank": to_item,
        },
        extras={
            "directions": (forward, backward),
            "modality": task.modality,
            "reachable": reachable,
        },
        warnings=tuple(runner.warnings),
        seconds=dict(runner.clock.seconds),
    )


def _partners(
    view: View, items: Items, task: TaskConfig, runner: Runner
) -> tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m"], list[str]]:
    """Embeddings of the other side, the item that each belongs to, and their texts, if any."""
    if task.partner != "text" or "text" in view.embedded:
        partners = runner.items(runner.select(view, items.index), task.partner)
        if len(partners) != len(items):
            raise ValueError(
                f"{len(items) - len(partners)} items have no usable {task.partner}; leave them out "
                "of the retrieval set."
            )
        return partners.embeds, np.arange(len(items)), []
    without = [i for i, group in zip(items.ids, items.captions, strict=True) if not group]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} items of {task.source!r} have no caption (the first: "
            f"{without[0]}); leave them out of the retrieval set."
        )
    owner = np.repeat(np.arange(len(items)), [len(group) for group in items.captions])
    captions = [text for group in items.captions for text in group]
    return runner.sentences(captions), owner, captions


def _reachable(
    captions: list[str],
    owner: Int[np.ndarray, "m"],
    ways: tuple[str, str],
    task: TaskConfig,
    runner: Runner,
) -> dict[str, float]:
    """R@k of a model that knows every caption, with a warning; empty where it is always right."""
    if len(set(captions)) == len(captions):
        return {}
    ranks = reachable_ranks(captions, owner)
    if all((way <= 1).all() for way in ranks):
        return {}
    repeated = len(captions) - len(set(captions))
    shares = ", ".join(
        f"{100 * np.mean(rank <= 1):.1f} % {way.replace('_', ' ')}"
        for way, rank in zip(ways, ranks, strict=True)
    )
    runner.warn(
        f"{repeated} of {len(captions)} captions repeat an earlier one: a model that knows every "
        f"caption reaches R@1 {shares}."
    )
    return {
        f"{way}_R@{k}": float(np.mean(rank <= k))
        for way, rank in zip(ways, ranks, strict=True)
        for k in task.recall_k
    }
