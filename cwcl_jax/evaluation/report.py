"""Writes evaluation results: results.json, results.md, pictures, and values per item."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cwcl_jax.evaluation.alignment import write_matrix
from cwcl_jax.evaluation.compare import draw_matrices
from cwcl_jax.evaluation.files import user_file
from cwcl_jax.evaluation.plots import plot_effective_robustness, plot_template_robustness
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.robustness import (
    read_baselines,
    robustness_points,
    robustness_table,
)
from cwcl_jax.evaluation.tables import Table, warning_lines
from cwcl_jax.evaluation.tasks.base import KINDS, Task
from cwcl_jax.files import parse_json, replacing, side_output, write_text

# Number of classes of one task that results.md lists; the CSV has all of them.
_SHOWN_CLASSES = 30


def all_tables(results: Sequence[TaskResult], *, baselines_file: str = "") -> list[Table]:
    """Returns all tables of the results, including robustness against baseline models."""
    tables = result_tables(results)
    if any(result.in_distribution for result in results):
        baselines = read_baselines(user_file(baselines_file)) if baselines_file else None
        if (robustness := robustness_table(results, baselines)) is not None:
            tables.append(robustness)
    return tables


def result_tables(results: Sequence[TaskResult]) -> list[Table]:
    """Returns the tables of all kinds of tasks: the package's kinds in order, then others."""
    groups: dict[type[Task], list[TaskResult]] = {}
    for result in results:
        # Kinds that inherit `tables` from the same class share a table.
        owner = next(cls for cls in type(result.task).__mro__ if "tables" in vars(cls))
        groups.setdefault(owner, []).append(result)
    ranked = sorted(groups.items(), key=lambda group: min(map(_place, group[1])))
    tables = [table for cls, group in ranked for table in cls.tables(group)]
    classes = dict.fromkeys(type(result.task) for result in results)
    return tables + [table for cls in classes for table in cls.published(results)]


def _place(result: TaskResult) -> int:
    """Returns the position of a result's kind among the package's kinds; other kinds come last."""
    kinds = [*KINDS]
    return kinds.index(result.kind) if result.kind in kinds else len(kinds)


def terminal_report(results: Sequence[TaskResult], *, baselines_file: str = "") -> str:
    """Returns all tables and warnings as plain text."""
    parts = [table.text() for table in all_tables(results, baselines_file=baselines_file)]
    warnings = warning_lines(results)
    if warnings:
        parts.append("\n".join(["Warnings", *(f"- {line}" for line in warnings)]))
    return "\n\n".join(parts)


def write_report(
    results: Sequence[TaskResult],
    folder: Path,
    *,
    model: str,
    pretrained: str = "",
    baselines_file: str = "",
) -> list[Path]:
    """Writes all forms of the results into `folder` and returns the files.

    Values per item of tasks that did not run this time are removed from `folder`, as from
    results.json.

    Args:
      results: results of the tasks that ran.
      folder: created if it does not exist.
      model: name of the model in results.json, e.g. the experiment's name.
      pretrained: name of its weights in results.json, e.g. `step 3000`.
      baselines_file: `EvaluationConfig.robustness_baselines`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = clip_benchmark_records(results, model=model, pretrained=pretrained)
    files = [folder / "results.json"]
    write_text(files[0], json.dumps(records, indent=2) + "\n")
    for old in (folder / "items").glob("*.npz"):
        if old.stem not in {result.name for result in results}:
            old.unlink()
    for result in results:
        files += _write_task_files(result, folder, model)
    title = page_title(model, pretrained)
    files.append(write_page(results, folder, title=title, baselines_file=baselines_file))
    curves, chance = template_curves(results)
    if curves:
        path = folder / "template_robustness.png"
        with side_output(path.name):
            files.append(
                plot_template_robustness(
                    curves, path, chance=chance, intervals=_template_intervals(results),
                    title=f"{model}: accuracy by number of prompt templates",
                )
            )  # fmt: skip
    if points := robustness_points(results):
        path = folder / "robustness.png"
        with side_output(path.name):
            title = f"{model}: robustness to distribution shift"
            files.append(plot_effective_robustness(points, path, title=title))
    return files


def tasks_beside(folder: Path, results: Sequence[TaskResult]) -> list[str]:
    """Returns the tasks with results in `folder` that did not run this time, sorted."""
    path = folder / "results.json"
    try:
        records = parse_json(path.read_bytes()) if path.exists() else []
        names = {record["name"] for record in records}
    except (ValueError, TypeError, KeyError):  # not written by this version
        return []
    return sorted(names - {result.name for result in results})


def page_title(model: str, pretrained: str) -> str:
    """Returns the heading of results.md."""
    return f"Evaluation of {model}" + (f" ({pretrained})" if pretrained else "")


def write_page(
    results: Sequence[TaskResult],
    folder: Path,
    *,
    title: str,
    more_tables: Sequence[Table] = (),
    baselines_file: str = "",
) -> Path:
    """Writes results.md and returns its path; `more_tables` are comparisons made by the caller."""
    path = folder / "results.md"
    tables = [*all_tables(results, baselines_file=baselines_file), *more_tables]
    write_text(path, markdown_report(results, tables, title))
    return path


def markdown_report(results: Sequence[TaskResult], tables: Sequence[Table], title: str) -> str:
    """Returns one Markdown page: tables, per-class rows, warnings, times."""
    parts = [f"## {title}", *(table.markdown() for table in tables)]
    parts += [_per_class(result).markdown() for result in results if _has_classes(result)]
    warnings = warning_lines(results)
    if warnings:
        parts.append("\n".join(["### Warnings", "", *(f"- {line}" for line in warnings)]))
    parts.append(_times(results).markdown())
    return "\n\n".join(part.strip() for part in parts) + "\n"


def template_curves(
    results: Sequence[TaskResult],
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Returns top-1 by number of templates, and chance, of the tasks that have template_counts."""
    curves, chance = {}, {}
    for result in results:
        counts = result.extras.get("template_counts") or ()
        if len(counts) > 1:
            curves[result.name] = {k: result.metrics[f"top1_k{k}"] for k in counts}
            chance[result.name] = result.chance[f"top1_k{counts[0]}"]
    return curves, chance


def _template_intervals(
    results: Sequence[TaskResult],
) -> dict[str, dict[int, tuple[float, float]]]:
    """Returns the intervals of the curves' points, for tasks that have any."""
    return {
        result.name: {
            k: result.intervals[f"top1_k{k}"]
            for k in result.extras.get("template_counts") or ()
            if f"top1_k{k}" in result.intervals
        }
        for result in results
    }


def clip_benchmark_records(
    results: Sequence[TaskResult], *, model: str, pretrained: str = ""
) -> list[dict[str, Any]]:
    """Returns one record per task and prompt set, in CLIP_benchmark's format.

    The records have additional keys that CLIP_benchmark does not know: `prompts`, `data`
    (fingerprints of the data used), `chance`, `intervals` and `name`, and `reachable` if captions
    of retrieval repeat (the metrics of a model that knows every caption).
    """
    records = []
    for result in results:
        for record in result.task.records(result):
            known = {new: old for new, old in record.metrics.items() if old in result.metrics}
            reachable = result.extras.get("reachable")
            records.append(
                {
                    "dataset": result.task.source,
                    "model": model,
                    "pretrained": pretrained,
                    "task": record.task,
                    "metrics": {new: result.metrics[old] for new, old in known.items()},
                    "language": "en",
                    "name": result.name,
                    "prompts": record.prompts,
                    "data": dict(result.data),
                    "chance": {
                        new: result.chance[old]
                        for new, old in known.items()
                        if old in result.chance
                    },
                    "intervals": {
                        new: list(result.intervals[old])
                        for new, old in known.items()
                        if old in result.intervals
                    },
                }
                | (
                    {"reachable": {n: reachable[o] for n, o in known.items() if o in reachable}}
                    if reachable
                    else {}
                )
            )
    return records


def _has_classes(result: TaskResult) -> bool:
    """Returns whether a list of classes is informative, i.e. not one item per class."""
    return any(row["items"] > 1 for row in result.extras.get("per_class") or ())


def _per_class(result: TaskResult) -> Table:
    rows = result.extras["per_class"]
    cells = tuple(tuple(_cell(value) for value in row.values()) for row in rows[:_SHOWN_CLASSES])
    header = tuple(rows[0]) if rows else ("class",)
    more = len(rows) - len(cells)
    notes = (f"{more} more classes are in {result.name}_classes.csv.",) if more else ()
    return Table(f"{result.name}: classes, worst first", header, cells, notes)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{100 * value:.1f} %"
    return str(value)


def _times(results: Sequence[TaskResult]) -> Table:
    names = list(dict.fromkeys(name for result in results for name in result.seconds))
    rows = [
        (result.name, *(f"{result.seconds.get(name, 0.0):.2f}" for name in names))
        for result in results
    ]
    return Table("Seconds", ("task", *names), tuple(rows))


def _write_task_files(result: TaskResult, folder: Path, model: str) -> list[Path]:
    """Writes and returns a task's files: values per item, classes (CSV), alignment (CSV, PNG)."""
    if not result.items:
        return []
    files = [folder / "items" / f"{result.name}.npz"]
    files[0].parent.mkdir(exist_ok=True)
    with replacing(files[0]) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **result.items)  # pyright: ignore[reportArgumentType]
    if rows := result.extras.get("per_class"):
        files.append(folder / f"{result.name}_classes.csv")
        with (
            replacing(files[-1]) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if "matrix" in result.items:
        ids, names = result.items["matrix_ids"].tolist(), result.items["matrix_classes"].tolist()
        table, picture = folder / f"{result.name}.csv", folder / f"{result.name}.png"
        files.append(write_matrix(table, result.items["matrix"], ids, names))
        tower = result.task.tower
        with side_output(picture.name):
            files.append(
                draw_matrices({f"{result.name}, {model}": result.items}, picture, tower=tower)
            )
    return files
