"""Checks tasks before anything is trained or encoded."""

from collections.abc import Collection, Sequence

from cwcl_jax.evaluation.files import user_file
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.evaluation.robustness import fit_line, read_baselines
from cwcl_jax.evaluation.tasks.classification import Classification


def check_tasks(config: EvaluationConfig, *, towers: Collection[str], cache_dir: str = "") -> None:
    """Opens what the tasks name (sources, class names, templates, baselines); reads no examples.

    Args:
      config: all tasks of the evaluation.
      towers: names of the model's towers.
      cache_dir: `data.cache_dir`.

    Raises:
      ValueError: tasks cannot run. The message has a line for each of them, with its name and, if
        there is one, the field.
    """
    problems: list[tuple[str, Exception]] = []
    for name, task in config.tasks.items():
        try:
            task.check(towers, cache_dir)
        except (ValueError, FileNotFoundError) as error:
            problems.append((f"evaluation.tasks.{name}: {str(error).rstrip('.')}", error))
    if problems:
        raise ValueError("\n".join(line for line, _ in problems)) from problems[0][1]
    if config.robustness_baselines:
        try:
            baselines = read_baselines(user_file(config.robustness_baselines))
        except (ValueError, FileNotFoundError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"evaluation.robustness_baselines: {reason}") from error
        for name in _shifted(config):
            if name in baselines:
                _check_line(name, baselines[name])


def check_in_distribution(config: EvaluationConfig) -> None:
    """Raises ValueError if a task's in_distribution is not a classification task of this run."""
    ranked = [name for name, task in config.tasks.items() if isinstance(task, Classification)]
    for name, base in _shifted(config).items():
        if base not in ranked:
            raise ValueError(
                f"evaluation.tasks.{name}: in_distribution={base!r} is not a classification task "
                f"of this run; its tasks are {ranked}"
            )


def _shifted(config: EvaluationConfig) -> dict[str, str]:
    """Returns the tasks that are compared with an in-distribution task, and that task's name."""
    return {
        name: task.in_distribution
        for name, task in config.tasks.items()
        if isinstance(task, Classification) and task.in_distribution
    }


def _check_line(name: str, points: Sequence[tuple[float, float]]) -> None:
    try:
        fit_line(points)
    except ValueError as error:
        raise ValueError(f"evaluation.robustness_baselines, task {name}: {error}") from error
