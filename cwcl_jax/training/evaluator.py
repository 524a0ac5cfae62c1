"""The tasks of a run: checked at its start, run at intervals, written at its end."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cwcl_jax.config import ConfigError, ExperimentConfig
from cwcl_jax.data.sources import Source
from cwcl_jax.evaluation.checks import check_in_distribution, check_tasks
from cwcl_jax.evaluation.report import terminal_report, write_report
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.runner import fingerprints, run_tasks, seen_in_training
from cwcl_jax.files import write_text
from cwcl_jax.training.distributed import is_primary
from cwcl_jax.training.encode import Encoder, tower_sources
from cwcl_jax.training.feature_cache import FeatureCache


class Evaluator:
    """Runs `config.evaluation` with an encoder; results go into the run's folder."""

    def __init__(self, config: ExperimentConfig, workdir: Path):
        self._config = config
        self._workdir = workdir
        self._seen: dict[str, str] = {}

    def compare_with(self, train: Source) -> list[str]:
        """Searches the training data for the tasks' data; returns what was found, as text."""
        config = self._config
        self._seen = seen_in_training(config.evaluation, train, config.data)
        return [f"evaluation task {name}: {told}" for name, told in self._seen.items()]

    def check_sources(self) -> None:
        """Raises ConfigError if a task cannot run: at the start, not after the last step."""
        config = self._config
        try:
            check_in_distribution(config.evaluation)
            check_tasks(config.evaluation, towers=config.towers, cache_dir=config.data.cache_dir)
        except ValueError as error:
            told = "\n".join(f"config.{line}" for line in str(error).splitlines())
            raise ConfigError(
                f"{told}; correct it, or leave out every task with --config.evaluation.tasks={{}}"
            ) from error

    def run(self, encoder: Encoder) -> dict[str, float]:
        """Returns metrics as `evaluation/task/metric`, for the log."""
        return _flat(self._results(encoder))

    def run_and_write(self, encoder: Encoder) -> tuple[str, dict[str, float]]:
        """Runs all tasks and writes their files.

        Returns the terminal's table, and the result of `run`.
        """
        results = self._results(encoder)
        baselines = self._config.evaluation.robustness_baselines
        if is_primary():
            write_report(
                results,
                self._workdir,
                model=self._config.name,
                pretrained=f"step {encoder.step}",
                baselines_file=baselines,
            )
        # After writing the results, so that a failing table cannot lose them.
        table = terminal_report(results, baselines_file=baselines) or "no evaluation tasks"
        if is_primary():
            write_text(self._table_path, table + "\n")
        return table, _flat(results)

    def fingerprints(self) -> dict[str, dict[str, str]]:
        """Returns the fingerprints of the tasks' data; empty if some of it is unavailable."""
        try:
            return fingerprints(self._config.evaluation, self._config.data)
        except (FileNotFoundError, ValueError, ImportError):
            return {}

    def has_results(self) -> bool:
        return self._table_path.exists()

    def saved_table(self) -> str:
        return self._table_path.read_text(encoding="utf-8").rstrip()

    @property
    def _table_path(self) -> Path:
        return self._workdir / "results.txt"

    def _results(self, encoder: Encoder) -> list[TaskResult]:
        kept = FeatureCache(encoder, tower_sources(self._workdir))
        results = run_tasks(
            self._config.evaluation,
            encode=kept.encode,
            data=self._config.data,
            features=partial(kept.encode, output="features"),
            weights_from=self._config.loss.weights_from,
            seen=self._seen,
        )
        kept.save()
        return results


def _flat(results: list[TaskResult]) -> dict[str, float]:
    return {
        f"evaluation/{name}": value for result in results for name, value in result.flat().items()
    }
