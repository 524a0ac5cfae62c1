"""The task retrieval: a source of items with captions, ranked in both directions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from cwcl_jax.evaluation.encoding import Items, View
from cwcl_jax.evaluation.results import Record, TaskResult
from cwcl_jax.evaluation.retrieval import (
    reachable_ranks,
    recall_chance,
    recall_metrics,
    retrieval_ranks,
    shared_groups,
)
from cwcl_jax.evaluation.runner import Runner
from cwcl_jax.evaluation.significance import bootstrap_intervals
from cwcl_jax.evaluation.tables import Table, interval_notes, metric_cells, metric_header
from cwcl_jax.evaluation.tasks.base import at_least, not_empty
from cwcl_jax.evaluation.tasks.labelled import Cropped


@dataclass(frozen=True)
class Retrieval(Cropped):
    """Ranks items against their captions, or against another tower's view of the same items."""

    tower: str = "image"
    partner: str = ""  # the tower of the other side; "" = text_tower
    text_tower: str = "text"  # reads the captions
    recall_k: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.partner:
            object.__setattr__(self, "partner", self.text_tower)
        at_least(1, self, "recall_k")
        not_empty(self, "recall_k")
        if self.partner == self.tower:
            raise ValueError(
                f"task field partner={self.partner!r} is the tower itself; retrieval is between "
                "two towers for the same items."
            )

    def check(self, towers: Collection[str], cache_dir: str = "") -> None:
        super().check(towers, cache_dir)
        self.require_tower("partner", towers)

    def run(self, name: str, runner: Runner) -> TaskResult:
        return run_retrieval(name, self, runner)

    @classmethod
    def tables(cls, results: Sequence[TaskResult]) -> list[Table]:
        return [_table(results)]

    def records(self, result: TaskResult) -> list[Record]:
        return [Record("zeroshot_retrieval", "", _record_names(result))]


def run_retrieval(name: str, task: Retrieval, runner: Runner) -> TaskResult:
    """Returns R@k and median rank of item -> partner and partner -> item."""
    sides = _sides(task.open(runner), task, runner)
    items, partners, owner = sides.items, sides.partners, sides.owner
    forward, backward = f"{task.tower}_to_{task.partner}", f"{task.partner}_to_{task.tower}"
    to_partner, to_item = retrieval_ranks(items.embeds, partners, owner, sides.of_items)
    metrics = recall_metrics(to_partner, forward, task.recall_k)
    metrics |= recall_metrics(to_item, backward, task.recall_k)
    right = np.bincount(owner)[sides.of_items]
    chance = recall_chance(right, len(partners), forward, task.recall_k)
    right = np.bincount(sides.of_items)[owner]
    chance |= recall_chance(right, len(items), backward, task.recall_k)
    hits = {f"{forward}_R@{k}": to_partner <= k for k in task.recall_k}
    back = {f"{backward}_R@{k}": to_item <= k for k in task.recall_k}
    reachable = _reachable(sides.captions, owner, (forward, backward), task, runner)
    # The captions of one item are not independent of each other: they are resampled together.
    intervals = bootstrap_intervals(hits, task, groups=sides.of_items)
    intervals |= bootstrap_intervals(back, task, groups=owner)
    return TaskResult(
        name=name,
        task=task,
        metrics=metrics,
        chance=chance,
        intervals=intervals,
        items={
            "ids": np.asarray(items.ids),
            "owner": owner,
            "owner_of_ids": sides.of_items,
            "recall_k": np.asarray(task.recall_k),
            f"{forward}_rank": to_partner,
            f"{backward}_rank": to_item,
        },
        extras={
            "directions": (forward, backward),
            "reachable": reachable,
        },
    )


@dataclass(frozen=True)
class _Sides:
    """Both sides; item i and partner j belong together if `of_items[i] == owner[j]`."""

    items: Items
    of_items: Int[np.ndarray, "n"]
    partners: Float[np.ndarray, "m d"]
    owner: Int[np.ndarray, "m"]
    captions: list[str]  # of the partners, if these are texts


def _sides(view: View, task: Retrieval, runner: Runner) -> _Sides:
    """Returns the embeddings of both sides, with repeated inputs merged into one item."""
    items = runner.items(view, task.tower)
    if task.partner != task.text_tower or task.partner in view.embedded:
        return _two_towers(view, items, task, runner)
    items = _once(items, task.tower, runner)
    without = [i for i, group in zip(items.ids, items.captions, strict=True) if not group]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} items of {task.source!r} have no caption (the first: "
            f"{without[0]}); leave them out of the retrieval set."
        )
    owner = np.repeat(np.arange(len(items)), [len(group) for group in items.captions])
    captions = [text for group in items.captions for text in group]
    embeds = runner.sentences(captions, tower=task.text_tower)
    return _Sides(items, np.arange(len(items)), embeds, owner, captions)


def _two_towers(view: View, items: Items, task: Retrieval, runner: Runner) -> _Sides:
    """Returns the views of two towers; several items of one side may match one of the other."""
    partners = runner.items(runner.select(view, items.index), task.partner)
    if len(partners) != len(items):
        raise ValueError(
            f"{len(items) - len(partners)} items have no usable {task.partner}; leave them out "
            "of the retrieval set."
        )
    groups = shared_groups(items.repeats(), partners.repeats())
    first = [np.unique(side.repeats(), return_index=True)[1] for side in (items, partners)]
    items = _once(items, task.tower, runner)
    partners = _once(partners, task.partner, runner)
    return _Sides(items, groups[first[0]], partners.embeds, groups[first[1]], [])


def _once(items: Items, tower: str, runner: Runner) -> Items:
    distinct = items.once()
    if len(distinct) < len(items):
        runner.warn(
            f"{len(items) - len(distinct)} of {len(items)} examples repeat the {tower} input of an "
            f"earlier one: there are {len(distinct)} {tower} items, each with all that belongs to "
            "it."
        )
    return distinct


def _reachable(
    captions: list[str],
    owner: Int[np.ndarray, "m"],
    ways: tuple[str, str],
    task: Retrieval,
    runner: Runner,
) -> dict[str, float]:
    """Returns R@k of a model that knows every caption, or an empty dict if it is always right.

    Adds a warning if captions repeat.
    """
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


def _table(results: Sequence[TaskResult]) -> Table:
    ks = sorted({int(k.rpartition("@")[2]) for r in results for k in r.metrics if "_R@" in k})
    header = ["task", "direction"]
    for k in ks:
        header += metric_header(f"R@{k} %", first=k == ks[0])
    rows = []
    for result in results:
        for way in result.extras["directions"]:
            row = [result.name, way.replace("_", " ")]
            for k in ks:
                row += metric_cells(result, f"{way}_R@{k}", first=k == ks[0])
            median = result.metrics[f"{way}_median_rank"]
            rows.append((*row, f"{median:g}", str(len(result.items[f"{way}_rank"]))))
    header += ["median rank", "queries"]
    return Table("Retrieval", tuple(header), tuple(rows), tuple(interval_notes(results)))


def _record_names(result: TaskResult) -> dict[str, str]:
    """Returns names of CLIP_benchmark -> ours.

    `text_retrieval_recall@5` retrieves texts: it is our image_to_text_R@5.
    """
    names = {}
    for way in result.extras["directions"]:
        target = way.rpartition("_to_")[2]
        for key in result.metrics:
            if key.startswith(f"{way}_"):
                rest = key.removeprefix(f"{way}_").replace("R@", "recall@")
                names[f"{target}_retrieval_{rest}"] = key
    return names
