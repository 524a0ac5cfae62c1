"""A run from settings to results: prepare, train, evaluate, write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash
from cwcl_jax.data.composers import ComposerError
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.data.sources import Source, WrongOrder
from cwcl_jax.exit_codes import DONE, PREEMPTED
from cwcl_jax.files import side_output
from cwcl_jax.modalities import WrongInputs
from cwcl_jax.training import ema, sharding, telling
from cwcl_jax.training.best import EVALUATION, VALIDATION, Best
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.checks import (
    check_inputs,
    check_own_loss,
    check_patch_dropout,
    check_task_inputs,
)
from cwcl_jax.training.coordination import barrier, gather, meet
from cwcl_jax.training.distributed import (
    check_agreement,
    code_version,
    compiler_flags,
    is_primary,
)
from cwcl_jax.training.embedding import check_features
from cwcl_jax.training.encode import EncodeFunctions, Encoder
from cwcl_jax.training.evaluator import Evaluator
from cwcl_jax.training.features import check_label_sets, composer_refused, training_source
from cwcl_jax.training.health import Health
from cwcl_jax.training.input import Batches, DeviceInput
from cwcl_jax.training.loop import Loop
from cwcl_jax.training.meter import Meter, Profiler
from cwcl_jax.training.metrics import Progress, check_writers, make_writers, read_json_lines
from cwcl_jax.training.own_code import ALL, check_same_code, code_of_tasks, write_code
from cwcl_jax.training.plots import plot_losses
from cwcl_jax.training.state import (
    Blueprint,
    Leaves,
    TowerSource,
    TrainState,
    initialise,
    locked_leaves,
    make_blueprint,
)
from cwcl_jax.training.step import TrainStep
from cwcl_jax.training.stopping import Stopped, StopSignal
from cwcl_jax.training.telling import say
from cwcl_jax.training.validation import Validation, split_source, validation_batches
from cwcl_jax.training.watchdog import Watchdog, unwatched
from cwcl_jax.training.workdir import (
    check_same_data,
    check_same_run,
    check_same_sources,
    environment,
    is_evaluated,
    only_user,
    steps_saved,
    withdraw_evaluated,
    write_evaluated,
    write_records,
)


def train(config: ExperimentConfig, workdir: Path, watchdog: Watchdog | None = None) -> int:
    """Trains in `workdir`, or resumes the run in it; returns the exit code.

    Raises:
      ConfigError: invalid settings, data or weights; raised before anything is computed, except for
          examples that turn out to be unusable.
      NonFiniteLossError: the loss diverged.
    """
    with only_user(workdir) if is_primary() else nullcontext():
        try:
            return _train(config, workdir, watchdog or unwatched())
        except (TooManyBadExamples, WrongInputs, WrongOrder) as error:
            raise ConfigError(str(error)) from error
        except ComposerError as error:  # also of a later epoch
            raise ConfigError(composer_refused(config, error)) from error
        except Stopped:
            say("stopped while features of locked encoders were computed; the same command resumes")
            return PREEMPTED


def _train(config: ExperimentConfig, workdir: Path, watchdog: Watchdog) -> int:
    check_writers(config)
    check_same_run(workdir, config)
    check_same_code(workdir, config, ALL, _OTHER_CODE)
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    evaluator = Evaluator(config, workdir)
    # This barrier names missing processes; the collective of orbax's that follows would not.
    barrier("start", config.distributed.barrier_timeout)
    with StopSignal() as stop:
        with ExitStack() as stack:
            batches, held = stack.enter_context(_open_batches(config, watchdog, stop))
            check_inputs(blueprint.config)
            check_patch_dropout(blueprint)
            data = _fingerprint(batches, held)
            check_same_data(workdir, data, config)
            validation = _open_validation(blueprint, held, watchdog, stack)
            seems_complete = steps_saved(workdir) >= config.total_steps
            if not seems_complete:  # a complete run's results are shown without the tasks' data
                evaluator.check_sources()
            # After everything that the user may have to correct: orbax's output would hide the
            # message.
            saved = Checkpoints(workdir / "checkpoints", config.checkpoint)
            checkpoints = stack.enter_context(saved)
            start = checkpoints.latest_step or 0
            best = Best(config.checkpoint, checkpoints.best())
            code = code_of_tasks(config.evaluation.tasks)
            evaluated = evaluator.has_results() and is_evaluated(
                workdir, start, config.evaluation, evaluator.fingerprints(), code
            )
            if (start >= config.total_steps or best.exhausted) and evaluated:
                early = start < config.total_steps
                why = f", ended early: {telling.why_ended(best)}" if early else ""
                say(f"{workdir} is complete ({start} steps{why}). Its results:\n")
                say(evaluator.saved_table())
                return DONE
            if seems_complete:
                evaluator.check_sources()
            state, locked, best = _begin(
                blueprint, workdir, checkpoints, batches, held, validation, evaluator, best, data
            )
            fit = _Fit(
                blueprint, workdir, checkpoints, batches, evaluator, validation, best, watchdog
            )
            state, finished = fit.run(state, locked, stop)
            telling.skipped_examples(batches.skipped, "training")
            if validation is not None:
                telling.skipped_examples(validation.skipped, "validation")
            if finished:
                telling.of_best(best, int(state.step), config.total_steps)
            with watchdog.phase("saving", "the last checkpoint"):
                checkpoints.wait()
                last = checkpoints.latest_step or 0
        if finished:
            finished = _finish(blueprint, workdir, evaluator, state, locked, stop, watchdog)
    if not finished:
        done = f"after step {last}, saved" if last else "before the first step"
        say(f"stopped {done}; the same command resumes")
        return PREEMPTED
    return DONE


def _open_validation(
    blueprint: Blueprint, held: Source | None, watchdog: Watchdog, stack: ExitStack
) -> Validation | None:
    """Returns the measurement of the held-out loss, which the stack closes; None without data."""
    if held is None:
        return None
    validation = Validation(blueprint, validation_batches(blueprint.config, held), watchdog.beat)
    stack.callback(validation.close)
    return validation


def _begin(
    blueprint: Blueprint,
    workdir: Path,
    checkpoints: Checkpoints,
    batches: Batches,
    held: Source | None,
    validation: Validation | None,
    evaluator: Evaluator,
    best: Best,
    data: Mapping[str, Any],
) -> tuple[TrainState, Leaves, Best]:
    """Returns state, locked leaves and best step to continue from, after all checks.

    Writes the run's records, and reports the findings.
    """
    config, start = blueprint.config, checkpoints.latest_step or 0
    check_own_loss(blueprint, batches.source)
    if validation is not None and best.kind == VALIDATION:
        best.require(validation.names(), VALIDATION)
    check_agreement(_facts(config, data, start), config.distributed.barrier_timeout)
    state, locked, sources = _start_state(blueprint, checkpoints, batches, start)
    start = int(state.step)
    best = _best_of(config, checkpoints, start)
    check_same_sources(workdir, sources, config)
    check_features(blueprint, batches.source, sources)
    if held is not None:
        check_features(blueprint, held, sources, what="config.data.validation")
        if config.data.validation:
            check_label_sets(config, held, "validation")
    check_task_inputs(blueprint, config.evaluation.tasks, sources, start)
    if is_primary():
        write_records(workdir, config, sources, _trained(blueprint), data)
        write_code(workdir, config)
    telling.before_training(blueprint, batches.source, evaluator, state)
    if batches.told:
        say(f"batches: {batches.told}")
    if validation is not None and held is not None:
        telling.of_validation(config, batches.source, held, validation)
    say(f"workdir {workdir}" + (f", resuming after step {start}" if start else "") + "\n")
    return state, locked, best


_OTHER_CODE = "give another --workdir, or set --config.checkpoint.accept_changes=True"


def _fingerprint(batches: Batches, held: Source | None) -> dict[str, Any]:
    """Returns the fingerprint of the training data, and of the held-out data if there is any."""
    found = batches.fingerprint()
    return found if held is None else found | {"validation": held.fingerprint()}


def _best_of(config: ExperimentConfig, checkpoints: Checkpoints, start: int) -> Best:
    """Returns what the checkpoint of step `start` stores about the best step, if of this metric."""
    saved = checkpoints.best(start) if start else None
    if saved and config.checkpoint.best and saved["name"] != config.checkpoint.best:
        say(
            f"the best step by {saved['name']} was step {saved['step']}; the best by "
            f"{config.checkpoint.best} is searched for from step {start} on"
        )
    best = Best(config.checkpoint, saved)
    checkpoints.keep(best.step)
    if best.step is not None and best.step not in checkpoints.steps:
        say(f"warning: the best step so far, {best.told()}, is no longer stored")
    return best


def _facts(config: ExperimentConfig, data: Mapping[str, Any], start: int) -> dict[str, str]:
    """Returns what all processes must have in common."""
    return {
        "settings": _common_settings(config),
        "code": code_version(),
        "packages": json.dumps(environment()["packages"]),
        "compiler flags": compiler_flags(os.environ),
        "training data": json.dumps(data, sort_keys=True, default=str),
        "first step": str(start),
    }


def _common_settings(config: ExperimentConfig) -> str:
    # Only the process's own number must differ.
    return config_hash(replace(config, distributed=replace(config.distributed, process_id=0)))


@contextmanager
def _open_batches(
    config: ExperimentConfig, watchdog: Watchdog, stop: StopSignal
) -> Iterator[tuple[Batches, Source | None]]:
    """Yields the training batches, and the held-out source or None."""
    import jax

    source = held = None
    try:
        source = _open_source(config, watchdog, stop)
        if source is not None:
            source, held = split_source(config, source)
        batches = train_batches(
            config.data,
            config.tower_names,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=source,
        )
    except (ConfigError, ComposerError):
        raise
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise ConfigError(
            f"config.data.train={config.data.train!r}: {reason}; set --config.data.train=..."
        ) from error
    try:
        yield batches, held
    finally:
        batches.close()


def _open_source(config: ExperimentConfig, watchdog: Watchdog, stop: StopSignal) -> Source | None:
    """Returns the training data; computing features of locked encoders may take hours.

    Raises:
      Stopped: on all processes, if one was asked to stop before its features were computed.
    """
    source = None
    with suppress(Stopped):
        source = training_source(config, _between_batches(stop.noticed, watchdog))
    if config.data.keep_locked_features:
        made = meet("features", str(source is not None), watchdog.beat)
        if set(made) != {"True"}:
            raise Stopped
    return source


def _start_state(
    blueprint: Blueprint, checkpoints: Checkpoints, batches: Batches, start: int
) -> tuple[TrainState, Leaves, dict[str, TowerSource]]:
    """Returns state, locked leaves and sources at step `start`, or an earlier one if it is damaged.

    Moves `batches` to the position of that step.
    """
    if not start:
        return initialise(blueprint)
    state, data_state = checkpoints.restore_newest(
        blueprint.abstract_state(), timeout=blueprint.config.distributed.barrier_timeout, warn=say
    )
    batches.set_state(data_state)
    if blueprint.config.optimizer.ema_decay and not state.ema:
        say(f"the run has no averages up to step {int(state.step)}: they start from its leaves")
        state = replace(state, ema=ema.begun(state.params))
    return state, *locked_leaves(blueprint)


def _trained(blueprint: Blueprint) -> dict[str, list[str]]:
    """Returns the paths of the trained leaves by tower."""
    return {
        modality: sorted(p for p in blueprint.trained if p.startswith(f"towers/{modality}/"))
        for modality in blueprint.config.towers
    }


class _Fit:
    """Builds the loop and what it needs, and closes it afterwards."""

    def __init__(
        self,
        blueprint: Blueprint,
        workdir: Path,
        checkpoints: Checkpoints,
        batches: Batches,
        evaluator: Evaluator,
        validation: Validation | None,
        best: Best,
        watchdog: Watchdog,
    ):
        self._blueprint = blueprint
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._batches = batches
        self._evaluator = evaluator
        self._validation = validation
        self._best = best
        self._watchdog = watchdog

    def run(self, state: TrainState, locked: Leaves, stop: StopSignal) -> tuple[TrainState, bool]:
        """Returns the last state, and whether the run is complete."""
        config, mesh = self._blueprint.config, self._blueprint.mesh
        start = int(state.step)
        functions = EncodeFunctions(self._blueprint)

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            encoder = Encoder(functions, state.model_leaves, locked, step)
            encoder.on_batch = _between_batches(stop.requested, self._watchdog)
            return self._evaluator.run(encoder)

        missing = self._evaluation_is_missing(start)
        writers = make_writers(self._workdir, config, start) if is_primary() else []
        device_input = DeviceInput(self._batches, mesh, depth=config.data.prefetch)
        loop = Loop(
            config,
            self._workdir,
            step=TrainStep(self._blueprint),
            checkpoints=self._checkpoints,
            writers=writers,
            progress=Progress(config.total_steps),
            evaluate=evaluate,
            validate=self._validation.run if self._validation else None,
            best=self._best,
            health=Health(
                config, {t: bool(paths) for t, paths in _trained(self._blueprint).items()}
            ),
            say=say,
            watchdog=self._watchdog,
            stop=stop,
            meter=Meter.of(self._blueprint),
            profiler=Profiler(config, self._workdir / "profile"),
        )
        try:
            return loop.run(state, locked, start, device_input, evaluation_is_missing=missing)
        finally:
            device_input.close()
            for writer in writers:
                writer.close()

    def _evaluation_is_missing(self, start: int) -> bool:
        """Returns whether the run was stopped in the evaluation after step `start`."""
        config = self._blueprint.config
        every = config.evaluation.every_steps
        if self._best.kind == EVALUATION:  # its state tells, also for the last step
            return bool(start and start % every == 0 and self._best.seen < start)
        if not (start and every and start % every == 0 and start < config.total_steps):
            return False
        records = read_json_lines(self._workdir / "metrics.jsonl") if is_primary() else []
        names = [name for record in records if record["step"] == start for name in record]
        found = any(name.startswith("evaluation/") for name in names)
        # Process 0 decides, because it rewrites the file next.
        timeout = config.distributed.barrier_timeout
        return gather("evaluation missing", str(not found), timeout)[0] == "True"


def _between_batches(requested: Callable[[], bool], watchdog: Watchdog) -> Callable[[], None]:
    def between() -> None:
        watchdog.beat()
        if requested():
            raise Stopped

    return between


def _finish(
    blueprint: Blueprint,
    workdir: Path,
    evaluator: Evaluator,
    state: TrainState,
    locked: Leaves,
    stop: StopSignal,
    watchdog: Watchdog,
) -> bool:
    """Evaluates the end of the run, writes and prints the results; returns False if stopped."""
    encoder = Encoder(EncodeFunctions(blueprint), state.model_leaves, locked, int(state.step))
    encoder.on_batch = _between_batches(stop.requested, watchdog)
    config = blueprint.config
    with watchdog.phase("evaluation", "after the last step"):
        if is_primary():
            withdraw_evaluated(workdir)
        try:
            table, metrics = evaluator.run_and_write(encoder)
        except Stopped:
            return False
        if is_primary():
            # Opened again: a complete run may only be evaluated, without a loop.
            for writer in make_writers(workdir, config, encoder.step, evaluate=True):
                if metrics:
                    writer.write(encoder.step, metrics)
                writer.close()
            with side_output("losses.png"):
                plot_losses(
                    workdir / "metrics.jsonl", workdir / "losses.png", name=config.name,
                    towers=config.tower_names, batch_size=config.global_batch_size,
                )  # fmt: skip
            code = code_of_tasks(config.evaluation.tasks)
            # Last, so that a run that dies before is evaluated again.
            data = evaluator.fingerprints()
            write_evaluated(workdir, encoder.step, config.evaluation, data, code)
    say("\n" + table)
    say(f"\nresults, metrics and plots are in {workdir}")
    return True
