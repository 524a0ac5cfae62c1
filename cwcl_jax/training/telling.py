"""Messages of a run in addition to its log: findings before the run, and its results."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.data.sources import Source
from cwcl_jax.data.sources.base import columns_taken
from cwcl_jax.models.augment import SpeechAugment
from cwcl_jax.training.best import Best
from cwcl_jax.training.distributed import is_primary
from cwcl_jax.training.evaluator import Evaluator
from cwcl_jax.training.state import Blueprint, TrainState
from cwcl_jax.training.summary import tower_table, unused_gpu
from cwcl_jax.training.validation import Validation, overlap

_UNFINISHED_WARMUP = (
    "warning: the warm-up of {} steps does not end in {} steps; the learning rate stays below its "
    "peak (config.optimizer.warmup_steps)"
)


def say(text: str) -> None:
    """Prints a line for the user, from one process only."""
    if is_primary():
        print(text, file=sys.stdout, flush=True)


def before_training(
    blueprint: Blueprint, source: Source, evaluator: Evaluator, state: TrainState
) -> None:
    """Reports what trains on what, and what may be unintended."""
    config = blueprint.config
    say(tower_table(blueprint))
    for told in columns_taken(source):
        say(f"training data: {told}")
    of_weights(blueprint, state)
    of_locked(blueprint)
    for told in evaluator.compare_with(source):
        say(f"warning: {told}")
    if warning := unused_gpu(os.environ):
        say(warning)
    if config.optimizer.warmup_steps > config.total_steps:
        say(_UNFINISHED_WARMUP.format(config.optimizer.warmup_steps, config.total_steps))


def of_weights(blueprint: Blueprint, state: TrainState) -> None:
    """Reports what the weights' files determine, and what they leave random permanently."""
    scale = state.params.get("logit_scale")
    if not int(state.step) and scale is not None:
        say(f"inverse temperature {math.exp(float(scale)):.4g} at the start")
    for name, tower in blueprint.config.towers.items():
        leaves = {path for path in blueprint.abstract if path.startswith(f"towers/{name}/")}
        trains = leaves & blueprint.trained
        if leaves and trains <= blueprint.low_rank and not tower.weights:
            part = "does not train" if not trains else "trains its low-rank additions only"
            say(f"warning: the {name} tower has no weights and {part}: it stays random")


# Settings of encoders that have an effect only in training.
_OF_TRAINING = (
    "dropout",
    *(field.name for field in dataclasses.fields(SpeechAugment) if not field.default),
)


def of_locked(blueprint: Blueprint) -> None:
    """Reports settings that a locked encoder, which computes as in evaluation, does not use."""
    for name, tower in blueprint.config.towers.items():
        unused = {x: tower.overrides[x] for x in _OF_TRAINING if tower.overrides.get(x)}
        if unused and blueprint.features_are_locked(name):
            told = ", ".join(f"{setting}={value}" for setting, value in unused.items())
            say(
                f"warning: without effect in config.towers.{name}.overrides: {told}, because the "
                f"encoder is locked (tune={tower.tune!r})"
            )


def of_validation(
    config: ExperimentConfig, train: Source, held: Source, validation: Validation
) -> None:
    """Reports what is held out, and which of it is also trained on."""
    say(
        f"validation: {validation.count} batches of {config.global_batch_size} of {len(held)} "
        f"examples, every {config.data.validation_every_steps} steps"
        + (f", composed by {config.data.batches}" if config.data.validation_composed else "")
    )
    if told := overlap(config, train, held):
        say(f"warning: validation: {told}")


def skipped_examples(skipped: Mapping[str, int], what: str) -> None:
    """Reports how many examples were unusable, by kind."""
    if skipped:
        kinds = ", ".join(f"{kind}: {n}" for kind, n in sorted(skipped.items()))
        total = sum(skipped.values())
        say(f"{total} {what} examples were unusable and skipped ({kinds})")


def of_best(best: Best, step: int, total_steps: int) -> None:
    """Reports why a run ended before its last step, and which step was the best."""
    if best.exhausted and step < total_steps:
        say(f"ended early at step {step} of {total_steps}: {why_ended(best)}")
    if best.told():
        say(f"best: {best.told()}, kept; evaluate, export and load_model accept it as step=best")


def why_ended(best: Best) -> str:
    """Returns why a run ended before its last step."""
    return f"{best.waited} values of {best.name} in a row were no better than {best.told()}"
