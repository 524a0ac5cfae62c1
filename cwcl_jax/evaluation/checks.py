"""What is wrong with tasks, found before anything is trained or encoded."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from cwcl_jax.data.sources import open_source
from cwcl_jax.evaluation.class_names import resolve_classes
from cwcl_jax.evaluation.classification import task_templates
from cwcl_jax.evaluation.options import (
    CLASSIFICATION_KINDS,
    PROBE_KINDS,
    EvaluationConfig,
    TaskConfig,
)
from cwcl_jax.evaluation.robustness import fit_line, read_baselines


def check_tasks(
    config: EvaluationConfig, *, modalities: Collection[str], cache_dir: str = ""
) -> None:
    """Opens what the tasks name (sources, class names, templates, baselines), reading no example.

    Args:
      config: all tasks of the evaluation.
      modalities: the model's towers.
      cache_dir: `data.cache_dir`.

    Raises:
      ValueError: a task that cannot run; names the task and, where there is one, the field.
    """
    for name, task in config.tasks.items():
        try:
            _check_task(task, modalities, cache_dir)
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"evaluation.tasks.{name}: {reason}") from error
    if config.robustness_baselines:
        try:
            baselines = read_baselines(Path(config.robustness_baselines).expanduser())
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"evaluation.robustness_baselines: {reason}") from error
        for name, task in config.tasks.items():
            if task.in_distribution and name in baselines:
                _check_line(name, baselines[name])


def check_in_distribution(config: EvaluationConfig) -> None:
    """Raises ValueError for a task that names an in-distribution one which is none, or no such."""
    ranked = [name for name, task in config.tasks.items() if task.kind in CLASSIFICATION_KINDS]
    for name, task in config.tasks.items():
        if task.in_distribution and task.in_distribution not in ranked:
            raise ValueError(
                f"evaluation.tasks.{name}: in_distribution={task.in_distribution!r} is no "
                f"classification task of this run; there are {ranked}"
            )


def _check_line(name: str, points: Sequence[tuple[float, float]]) -> None:
    try:
        fit_line(points)
    except ValueError as error:
        raise ValueError(f"evaluation.robustness_baselines, task {name}: {error}") from error


def _check_task(task: TaskConfig, modalities: Collection[str], cache_dir: str) -> None:
    used = [task.modality]
    if task.kind not in PROBE_KINDS:
        used.append(task.partner if task.kind == "retrieval" else "text")
    for modality in used:
        if modality not in modalities:
            raise ValueError(
                f"the model has no {modality!r} tower for this {task.kind} task; it has "
                f"{sorted(modalities)}: set modality (and partner, for retrieval) to its towers"
            )
    if task.kind in CLASSIFICATION_KINDS:
        task_templates(task)
    needed = ("source", "train_source") if task.kind in PROBE_KINDS else ("source",)
    for field in ("source", "template_source", "train_source"):
        line = getattr(task, field)
        if line or field in needed:
            names = _class_names(line, cache_dir, field)
            if field in needed and task.kind != "retrieval":
                resolve_classes(names, replace(task, source=line))


def _class_names(line: str, cache_dir: str, field: str) -> list[str] | None:
    if not line:
        raise ValueError(f"{field} is empty; name a source, such as scenes:test?task=shape")
    try:
        names = open_source(line, cache_dir=cache_dir).class_names
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{field}={line!r}: {error}") from error
    return None if names is None else list(names)
