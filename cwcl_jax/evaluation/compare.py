"""Compares two evaluated runs: paired tests on the same items, and matrices on one colour scale."""

import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.evaluation.plots import plot_matrices, plot_template_robustness
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.significance import PairedTest, holm, paired_test
from cwcl_jax.evaluation.tables import Table

SavedItems = Mapping[str, np.ndarray]
Pair = tuple[SavedItems, SavedItems]  # of run A and of run B
# Keys that describe the task; their values are not per item.
_ABOUT = ("prompts", "class_names", "top_k", "recall_k", "data")
_SAME = {"class_names": "class names", "labels": "labels", "owner": "captions", "data": "data"}
_BY_TEMPLATES = "accuracy by number of templates"
# Values of k that earlier versions used without saving them.
_KS = {"top_k": (1, 5), "recall_k": (1, 5, 10)}


def compare_with(
    results: Sequence[TaskResult],
    name: str,
    others: Mapping[str, SavedItems],
    other_name: str,
    folder: Path,
) -> tuple[Table, list[Path]]:
    """Compares the run `name`, just evaluated, with another one; writes pictures into `folder`.

    What cannot be compared is left out, with a note below the table.

    Args:
      results: results of the tasks that ran.
      name: name of the run.
      others: the other run's values per item (`load_items`).
      other_name: name of the other run.
      folder: folder of the run's results.

    Returns:
      The table of comparisons, and the paths of the pictures.
    """
    names = (other_name if other_name != name else f"{other_name} (other)", name)
    pairs, notes = pair_up(others, {result.name: result.items for result in results})
    towers = {result.name: result.task.tower for result in results}
    pictures = compare_matrices(pairs, names, folder, towers=towers)
    chance = {result.name: result.chance.get("top1", 0.0) for result in results}
    pictures += compare_templates(pairs, names, folder, chance=chance)
    return comparison_table(paired_tests(pairs), names, notes=notes), pictures


def item_files(folder: Path) -> list[Path]:
    """Returns the files of values per item, one per task, in `folder` or `folder`/evaluation.

    If both have a task, the file of the evaluation is used: it is newer than that of the training.

    Raises:
      FileNotFoundError: there are none.
    """
    places = (folder / "items", folder / "evaluation" / "items")
    files = {path.stem: path for place in places for path in sorted(place.glob("*.npz"))}
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no evaluation with values per item (items/*.npz); evaluate that run "
            "first, with the same tasks."
        )
    return [files[task] for task in sorted(files)]


def load_items(folder: Path) -> dict[str, SavedItems]:
    """Returns the values per item that an evaluation saved in a folder, by task."""
    loaded = {}
    for path in item_files(folder):
        try:
            # Opened explicitly: numpy does not close a file that it fails to read.
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                loaded[path.stem] = {name: file[name] for name in file.files}
        except (EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}); evaluate that run again.") from error
    return loaded


def check_common(tasks: Collection[str], others: Mapping[str, SavedItems]) -> None:
    """Raises ValueError if the two runs share no task."""
    if not set(tasks) & set(others):
        raise ValueError(
            f"the runs share no task: {sorted(tasks)} here, {sorted(others)} in the other; "
            "evaluate both on the same tasks."
        )


def pair_up(
    a: Mapping[str, SavedItems], b: Mapping[str, SavedItems]
) -> tuple[dict[str, Pair], list[str]]:
    """Returns the tasks of both runs on their common items, and notes for the reader."""
    pairs: dict[str, Pair] = {}
    notes = []
    for task in a:
        if task not in b:
            continue
        pair = a[task], b[task]
        key = "matrix_ids" if "matrix" in a[task] else "ids"
        one, other = (side.get(key, np.empty(0)) for side in pair)
        if not np.array_equal(one, other):
            counts = f"{len(one)} and {len(other)}"
            common = _on_common_items(*pair)
            if isinstance(common, str):
                notes.append(
                    f"{task}: not compared, since the two runs used different items ({counts}), "
                    f"and {common}."
                )
                continue
            pair = common
            notes.append(f"{task}: on the {len(pair[0]['ids'])} items that both have, of {counts}.")
        notes += [f"{task}: {line}" for line in _differences(*pair)]
        pairs[task] = pair
    return pairs, notes


def _on_common_items(a: SavedItems, b: SavedItems) -> Pair | str:
    """Returns both runs on their common items, or why they cannot be compared on these."""
    if "owner" in a or "matrix" in a:
        return "its ranks depend on the whole set"
    if any(len(set(side["ids"].tolist())) < len(side["ids"]) for side in (a, b)):
        return "some items share an id"
    place = {name: at for at, name in enumerate(b["ids"].tolist())}
    chosen = [(i, place[name]) for i, name in enumerate(a["ids"].tolist()) if name in place]
    if not chosen:
        return "no id is in both"
    cut = [
        {key: value if key.startswith(_ABOUT) else value[list(rows)] for key, value in side.items()}
        for side, rows in zip((a, b), zip(*chosen, strict=True), strict=True)
    ]
    return cut[0], cut[1]


def _differences(a: SavedItems, b: SavedItems) -> list[str]:
    """Returns notes on how two runs of a task differ besides the model.

    Files of older versions hold fewer keys, so fewer differences are found.
    """
    lines = []
    for key in sorted(a.keys() & b.keys()):
        if np.array_equal(a[key], b[key]):
            continue
        if key.startswith("prompts"):
            lines.append(f"different prompts in the two runs, {a[key][0]} and {b[key][0]}.")
        elif key in _SAME:
            lines.append(f"different {_SAME[key]} in the two runs.")
    return lines


def paired_tests(pairs: Mapping[str, Pair]) -> dict[str, PairedTest]:
    """Returns `task/metric` -> test of run B against run A."""
    return {
        f"{task}/{metric}": paired_test(one, other, groups=groups)
        for task, pair in pairs.items()
        for metric, (one, other, groups) in _values(*pair).items()
    }


def comparison_table(
    tests: Mapping[str, PairedTest], names: tuple[str, str], *, notes: Sequence[str] = ()
) -> Table:
    """Returns a table of differences with intervals and p-values, Holm-corrected over its rows."""
    corrected = holm([test.p_value for test in tests.values()])
    rows = []
    for (key, test), p_value in zip(tests.items(), corrected, strict=True):
        low, high = test.interval
        verdict = "no difference shown"
        if p_value < 0.05:
            verdict = "higher" if test.difference > 0 else "lower"
        rows.append(
            (
                key,
                f"{100 * test.mean_a:.2f}",
                f"{100 * test.mean_b:.2f}",
                f"{100 * test.difference:+.2f}",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                f"{test.p_value:.2g}",
                f"{p_value:.2g}",
                verdict,
            )
        )
    header = ("metric", f"{names[0]} %", f"{names[1]} %", "difference", "interval")
    return Table(
        f"{names[1]} against {names[0]}, on the same items",
        (*header, "p", "p, Holm", f"{names[1]} is"),
        tuple(rows),
        (
            "Paired: McNemar's exact test, or sign flips where items come in groups; bootstrap "
            "intervals. The runs have one seed each: other seeds may differ by more.",
            *notes,
        ),
    )


def compare_matrices(
    pairs: Mapping[str, Pair],
    names: tuple[str, str],
    folder: Path,
    *,
    towers: Mapping[str, str],
) -> list[Path]:
    """Draws Figure 7, the alignment matrices of both runs; returns one path per alignment task."""
    return [
        draw_matrices(
            dict(zip(names, pair, strict=True)),
            folder / f"{task}_compared.png",
            tower=towers[task],
        )
        for task, pair in pairs.items()
        if "matrix" in pair[0]
    ]


def compare_templates(
    pairs: Mapping[str, Pair],
    names: tuple[str, str],
    folder: Path,
    *,
    chance: Mapping[str, float],
) -> list[Path]:
    """Draws Figure 5, top-1 by number of templates of both runs; returns one path per task."""
    files = []
    for task, pair in pairs.items():
        curves = {
            name: {
                int(key.removeprefix("rank_k")): float(np.mean(items[key] == 1))
                for key in items
                if key.startswith("rank_k")
            }
            for name, items in zip(names, pair, strict=True)
        }
        if all(len(curve) > 1 for curve in curves.values()):
            path = folder / f"{task}_templates_compared.png"
            level = {names[1]: chance[task]}
            title = f"{task}: {_BY_TEMPLATES}"
            files.append(plot_template_robustness(curves, path, chance=level, title=title))
    return files


def draw_matrices(items: Mapping[str, SavedItems], path: Path, *, tower: str = "speech") -> Path:
    """Draws one panel per run, titled with its block diagonality; returns the path."""
    first = next(iter(items.values()))
    classes, places = np.unique(first["matrix_classes"], return_index=True)
    order = np.argsort(places)
    names = [str(name) for name in classes[order]]
    sizes = [int(np.sum(first["matrix_classes"] == name)) for name in names]
    notes = {name: f"block diagonality {_diagonality(part):.3f}" for name, part in items.items()}
    matrices = {name: part["matrix"] for name, part in items.items()}
    return plot_matrices(matrices, sizes, names, path, notes=notes, y_label=f"{tower} embeddings")


def _diagonality(items: SavedItems) -> float:
    same = items["matrix_classes"][:, None] == items["matrix_classes"][None, :]
    return float(items["matrix"][same].mean() - items["matrix"][~same].mean())


def _common_ks(a: SavedItems, b: SavedItems, name: str) -> list[int]:
    """Returns the values of k that both runs report."""
    one, other = (np.asarray(side.get(name, _KS[name])).tolist() for side in (a, b))
    return [k for k in one if k in other]


def _values(
    a: SavedItems, b: SavedItems
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Returns metric -> values of both runs, and the groups of dependent items."""
    values = {}
    for key in a:
        if key not in b or a[key].shape != b[key].shape:
            continue
        if key.startswith("rank_") and all(np.array_equal(x[key], x["rank"]) for x in (a, b)):
            continue  # the first k templates are all templates: not a second test
        if key.endswith("_rank") and "owner" in a:
            way = key.removesuffix("_rank")
            # Queries of one group are resampled together. Older results do not store the items'
            # groups.
            of_items = a.get("owner_of_ids", np.arange(len(a["ids"])))
            groups = of_items if len(a[key]) == len(a["ids"]) else a["owner"]
            for k in _common_ks(a, b, "recall_k"):
                values[f"{way}_R@{k}"] = (a[key] <= k, b[key] <= k, groups)
        elif key.startswith(("rank", "text_rank")):
            prefix, _, suffix = key.partition("rank")
            for k in _common_ks(a, b, "top_k"):
                hits = a[key] <= k, b[key] <= k
                values[f"{prefix}top{k}{suffix}"] = (*hits, a.get("groups"))
        elif key.startswith("hit_"):
            values[key.removeprefix("hit_")] = (a[key], b[key], None)
    return values
