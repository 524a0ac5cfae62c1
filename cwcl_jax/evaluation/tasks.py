"""Runs the tasks of an evaluation: one function per kind, from a source to a `TaskResult`."""

from collections.abc import Callable

from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.evaluation.alignment_task import run_alignment
from cwcl_jax.evaluation.classification import run_classification
from cwcl_jax.evaluation.encoding import Encode
from cwcl_jax.evaluation.options import EvaluationConfig, TaskConfig
from cwcl_jax.evaluation.probe_task import run_probe
from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.retrieval_task import run_retrieval
from cwcl_jax.evaluation.runner import Runner

_RUN: dict[str, Callable[[str, TaskConfig, Runner], TaskResult]] = {
    "zero_shot": run_classification,
    "intent": run_classification,
    "keywords": run_classification,
    "retrieval": run_retrieval,
    "alignment": run_alignment,
    "linear_probe": run_probe,
    "few_shot": run_probe,
}


def run_task(
    name: str,
    task: TaskConfig,
    *,
    encode: Encode,
    data: DataConfig,
    batch_size: int = 256,
    features: Encode | None = None,
    weights_from: str = "",
    earlier: Runner | None = None,
) -> TaskResult:
    """One task with one encoder.

    Args:
      name: under which its numbers are reported.
      task: what to do.
      encode: `encode(modality, inputs) -> (b, d)`; gets batches of `batch_size`.
      data: how pictures, sentences and recordings become inputs.
      batch_size: examples per call.
      features: like `encode`, before the projection head; for probes that ask for it.
      weights_from: the modality that gives the loss its weights; with `features` alignment also
        says what its projection keeps.
      earlier: of another task with the same encoder, whose embeddings are used again.
    """
    runner = Runner(encode, data, batch_size, features, weights_from)
    if earlier is not None:
        runner.known_items = earlier.known_items
        runner.known_sentences = earlier.known_sentences
    try:
        return _RUN[task.kind](name, task, runner)
    except TooManyBadExamples as error:
        raise TooManyBadExamples(f"evaluation task {name!r}: {error}") from error
    except (ValueError, FileNotFoundError) as error:
        # Not of the error's own type: many subclasses of ValueError take other arguments.
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"evaluation task {name!r}: {error}") from error


def run_tasks(
    config: EvaluationConfig,
    *,
    encode: Encode,
    data: DataConfig,
    features: Encode | None = None,
    weights_from: str = "",
) -> list[TaskResult]:
    """All tasks of `config`, in its order."""
    shared = Runner(encode, data, config.batch_size, features, weights_from)
    return [
        run_task(
            name,
            task,
            encode=encode,
            data=data,
            batch_size=config.batch_size,
            features=features,
            weights_from=weights_from,
            earlier=shared,
        )
        for name, task in config.tasks.items()
    ]
