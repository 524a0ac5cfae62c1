"""Two evaluated runs side by side: paired tests on the same items, matrices on one scale."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cwcl_jax.evaluation.plots import plot_matrices, plot_template_robustness
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.significance import PairedTest, holm, paired_test
from cwcl_jax.evaluation.tables import Table

Items = Mapping[str, np.ndarray]
_BY_TEMPLATES = "accuracy by number of templates"
_KS = {"classes": (1, 5), "retrieval": (1, 5, 10)}


def compare_with(
    results: Sequence[TaskResult], name: str, other: Path, folder: Path
) -> tuple[Table, list[Path]]:
    """Run `name`, just evaluated, against the run in `other`; pictures go into `folder`."""
    own = {result.name: result.items for result in results}
    others = load_items(other)
    names = (other.resolve().name, name)
    if names[0] == names[1]:
        names = (f"{names[0]} (other)", name)
    tests = paired_tests(others, own)
    pictures = compare_matrices(others, own, names, folder)
    chance = {result.name: result.chance.get("top1", 0.0) for result in results}
    pictures += compare_templates(others, own, names, folder, chance=chance)
    return comparison_table(tests, names), pictures


def item_files(folder: Path) -> list[Path]:
    """Files of the values per item, one a task, in `folder` or `folder`/evaluation.

    Raises:
      FileNotFoundError: there are none.
    """
    found = [folder / "evaluation" / "items", folder / "items"]
    files = next((files for path in found if (files := sorted(path.glob("*.npz")))), [])
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no evaluation with values per item (items/*.npz); evaluate that run "
            "first, with the same tasks."
        )
    return files


def load_items(folder: Path) -> dict[str, Items]:
    """The values per item that an evaluation left in a folder, by task."""
    loaded = {}
    for path in item_files(folder):
        with np.load(path, allow_pickle=False) as file:
            loaded[path.stem] = {name: file[name] for name in file.files}
    return loaded


def paired_tests(a: Mapping[str, Items], b: Mapping[str, Items]) -> dict[str, PairedTest]:
    """`task/metric` -> test of run B against run A, for all tasks that both have."""
    common = [name for name in a if name in b]
    if not common:
        raise ValueError(f"the runs share no task: {sorted(a)} and {sorted(b)}.")
    tests = {}
    for name in common:
        if not np.array_equal(a[name]["ids"], b[name]["ids"]):
            raise ValueError(
                f"task {name!r} ran on other items in the two runs; evaluate both on the same data."
            )
        for metric, (one, other, groups) in _values(a[name], b[name]).items():
            tests[f"{name}/{metric}"] = paired_test(one, other, groups=groups)
    return tests


def comparison_table(tests: Mapping[str, PairedTest], names: tuple[str, str]) -> Table:
    """Differences with intervals and p-values, corrected for the number of rows (Holm)."""
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
            "intervals. The runs are one seed each: other seeds may differ by more.",
        ),
    )


def compare_matrices(
    a: Mapping[str, Items], b: Mapping[str, Items], names: tuple[str, str], folder: Path
) -> list[Path]:
    """Figure 7: the alignment matrices of both runs, one picture per alignment task."""
    files = []
    for task in a:
        if task not in b or "matrix" not in a[task] or "matrix" not in b[task]:
            continue
        if not np.array_equal(a[task]["matrix_ids"], b[task]["matrix_ids"]):
            raise ValueError(f"alignment task {task!r} drew other items in the two runs.")
        files.append(
            draw_matrices({names[0]: a[task], names[1]: b[task]}, folder / f"{task}_compared.png")
        )
    return files


def compare_templates(
    a: Mapping[str, Items],
    b: Mapping[str, Items],
    names: tuple[str, str],
    folder: Path,
    *,
    chance: Mapping[str, float],
) -> list[Path]:
    """Figure 5: top-1 by number of templates of both runs, one picture per task."""
    files = []
    for task in a:
        curves = {
            name: {
                int(key.removeprefix("rank_k")): float(np.mean(items[task][key] == 1))
                for key in items[task]
                if key.startswith("rank_k")
            }
            for name, items in zip(names, (a, b), strict=True)
            if task in items
        }
        if len(curves) == 2 and all(len(curve) > 1 for curve in curves.values()):
            path = folder / f"{task}_templates_compared.png"
            level = {names[1]: chance[task]}
            title = f"{task}: {_BY_TEMPLATES}"
            files.append(plot_template_robustness(curves, path, chance=level, title=title))
    return files


def draw_matrices(items: Mapping[str, Items], path: Path, *, modality: str = "speech") -> Path:
    """One panel per run, titled with its block diagonality."""
    first = next(iter(items.values()))
    classes, places = np.unique(first["matrix_classes"], return_index=True)
    order = np.argsort(places)
    names = [str(name) for name in classes[order]]
    sizes = [int(np.sum(first["matrix_classes"] == name)) for name in names]
    notes = {name: f"block diagonality {_diagonality(part):.3f}" for name, part in items.items()}
    matrices = {name: part["matrix"] for name, part in items.items()}
    return plot_matrices(
        matrices, sizes, names, path, notes=notes, y_label=f"{modality} embeddings"
    )


def _diagonality(items: Items) -> float:
    same = items["matrix_classes"][:, None] == items["matrix_classes"][None, :]
    return float(items["matrix"][same].mean() - items["matrix"][~same].mean())


def _values(a: Items, b: Items) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Metric -> values of both runs and the groups that belong together."""
    values = {}
    for key in a:
        if key not in b or a[key].shape != b[key].shape:
            continue
        if key.startswith("rank_") and all(np.array_equal(x[key], x["rank"]) for x in (a, b)):
            continue  # the first k templates are all templates: not a second test
        if key.endswith("_rank") and "owner" in a:
            way = key.removesuffix("_rank")
            groups = a["owner"] if len(a[key]) == len(a["owner"]) != len(a["ids"]) else None
            for k in _KS["retrieval"]:
                values[f"{way}_R@{k}"] = (a[key] <= k, b[key] <= k, groups)
        elif key.startswith(("rank", "text_rank")):
            prefix, _, suffix = key.partition("rank")
            for k in _KS["classes"]:
                hits = a[key] <= k, b[key] <= k
                values[f"{prefix}top{k}{suffix}"] = (*hits, a.get("groups"))
        elif key.startswith("hit_"):
            values[key.removeprefix("hit_")] = (a[key], b[key], None)
    return values
