"""The training loop: sequences data, step, logs, checkpoints and evaluation, and nothing else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax
import numpy as np

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.training.best import EVALUATION, TRAINING, VALIDATION, Best
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.coordination import barrier
from cwcl_jax.training.health import Health
from cwcl_jax.training.input import DeviceBatch, DeviceInput
from cwcl_jax.training.meter import Meter, Profiler
from cwcl_jax.training.metrics import Progress, Writer, validation_line
from cwcl_jax.training.state import Leaves, TrainState
from cwcl_jax.training.step import TrainStep
from cwcl_jax.training.stopping import Stopped, StopSignal
from cwcl_jax.training.watchdog import Watchdog
from cwcl_jax.training.workdir import write_json

# Steps that may be in flight on the devices: enough to hide dispatch, few enough that their batches
# do not fill the memory.
_IN_FLIGHT = 2


class NonFiniteLossError(RuntimeError):
    """Loss or gradient became NaN or infinite; the message names step, checkpoint and batch."""


class _Pending(NamedTuple):
    step: int
    metrics: dict[str, jax.Array]
    index: np.ndarray


class Loop:
    """Trains from a state to `config.total_steps`, until patience ends, or until asked to stop.

    Args:
      validate: called with (state, locked) at the chosen interval; returns scalars to log. None if
          nothing is held out.
      evaluate: called with (state, step) at the chosen interval; returns scalars to log, or raises
          Stopped if a stop was requested during it.
      best: receives every value, and decides what is kept and when to end.
      health: finds problems among the metrics.
      say: prints a line for the user.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        workdir: Path,
        *,
        step: TrainStep,
        checkpoints: Checkpoints,
        writers: list[Writer],
        progress: Progress,
        evaluate: Callable[[TrainState, int], dict[str, float]],
        validate: Callable[[TrainState, Leaves], dict[str, float]] | None,
        best: Best,
        health: Health,
        say: Callable[[str], None],
        watchdog: Watchdog,
        stop: StopSignal,
        meter: Meter,
        profiler: Profiler,
    ):
        self._config = config
        self._workdir = workdir
        self._step = step
        self._checkpoints = checkpoints
        self._writers = writers
        self._progress = progress
        self._evaluate = evaluate
        self._validate = validate
        self._validated: dict[str, float] = {}
        self._best = best
        self._health = health
        self._say = say
        self._watchdog = watchdog
        self._stop = stop
        self._meter = meter
        self._profiler = profiler
        self._unread: deque[_Pending] = deque()
        self._last_values: dict[str, float] = {}
        self._failure: OSError | None = None

    def run(
        self,
        state: TrainState,
        locked: Leaves,
        done: int,
        batches: DeviceInput,
        *,
        evaluation_is_missing: bool = False,
    ) -> tuple[TrainState, bool]:
        """Returns the state after the last step, and whether the run is complete.

        Args:
          evaluation_is_missing: the run was stopped in the evaluation after step `done`.

        Raises:
          NonFiniteLossError: checkpoints made before it remain.
          OSError: metrics could not be written; all processes saved and stopped before.
          ConfigError: no measurement provides the metric that selects the best step.
        """
        config, stop = self._config, self._stop
        clock = _Clock(config.global_batch_size, batches)
        start, stopping = done, done < config.total_steps and stop.requested()
        if evaluation_is_missing and not stopping:
            stopping = not self._run_evaluation(state, done)
        while done < config.total_steps and not stopping and not self._best.exhausted:
            with self._watchdog.phase("first_step" if done == start else "step"):
                self._profiler.at(done, state)
                state, batch = self._advance(state, locked, batches, done + 1)
                if done == start:  # its limit covers the compilation, which is finished then
                    jax.block_until_ready(self._unread[-1].metrics)
                done += 1
                if (
                    done == 1
                    or done % config.logging.every_steps == 0
                    or done == config.total_steps
                ):
                    self._log(done, clock, batch)
            if self._validation_is_due(done):
                self._run_validation(state, locked, done)
                clock.restart(done)
            stopping = done < config.total_steps and stop.requested()
            # A metric that selects the best step is measured before the checkpoint that stores it.
            evaluated = self._best.kind == EVALUATION and self._evaluation_is_due(done)
            if evaluated and not stopping:
                stopping = not self._run_evaluation(state, done)
                clock.restart(done)
            saved = self._save_is_due(done) or stopping
            if saved:
                self._save(done, state, batch)
            if self._evaluation_is_due(done) and not stopping and not evaluated:
                stopping = not self._run_evaluation(state, done)
                if stopping and not saved:
                    self._save(done, state, batch)
                clock.restart(done)
        self._profiler.end(state)
        self._progress.end()
        if self._failure is not None:
            raise self._failure
        return state, not stopping

    def _advance(
        self, state: TrainState, locked: Leaves, batches: DeviceInput, number: int
    ) -> tuple[TrainState, DeviceBatch]:
        """Sends a step to the devices, waits for an earlier one; returns state and batch."""
        self._watchdog.beat(f"step {number}, waiting for data")
        batch = next(batches)
        self._watchdog.beat(f"step {number}, on the devices")
        state, metrics = self._step(state, locked, batch.arrays)
        self._unread.append(_Pending(number, metrics, batch.index))
        self._throttle()
        return state, batch

    def _throttle(self) -> None:
        """Waits for the step before the last one."""
        if len(self._unread) > _IN_FLIGHT:
            jax.block_until_ready(self._unread[-_IN_FLIGHT - 1].metrics)

    def _log(self, done: int, clock: _Clock, batch: DeviceBatch) -> None:
        """Reads the metrics that the devices computed, checks all steps, writes the last one."""
        values = self._read_metrics()
        self._best.observe(done, values, TRAINING)
        for warning in self._health.look(done, values):
            self._progress.end()
            self._say(f"warning: {warning}")
        speed = clock.lap(done)
        values |= speed
        if "seconds_per_step" in speed:
            values |= self._meter.read(clock.seconds_per_step)
        else:  # nothing is timed yet
            self._meter.prepare(batch.arrays)
            clock.restart()
        self._write(done, values)
        remaining = (self._config.total_steps - done) * clock.seconds_per_step
        self._progress.show(done, values | self._validated, eta_seconds=remaining)

    def _read_metrics(self) -> dict[str, float]:
        """Returns the newest step's metrics as floats, after checking every unread step."""
        while self._unread:
            pending = self._unread.popleft()
            values = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
            # Also the gradient: if it is not finite, the parameters are already damaged, but the
            # loss shows it only in the next step, whose batch would be blamed.
            for name, words in (("loss", "loss"), ("gradient_norm", "gradient's norm")):
                if not np.isfinite(values[name]):
                    self._report_non_finite(pending, values, f"the {words} is {values[name]}")
            self._last_values = values
        return dict(self._last_values)

    def _report_non_finite(
        self, pending: _Pending, values: dict[str, float], what: str
    ) -> NoReturn:
        path = self._workdir / f"non_finite_step_{pending.step}.json"
        good = self._checkpoints.latest_step
        record = {
            "step": pending.step,
            "last_good_checkpoint": good,
            "metrics": {k: repr(v) for k, v in values.items()},
            "example_index": pending.index.tolist(),
        }
        if jax.process_index() == 0:
            write_json(path, record)
        self._progress.end()
        raise NonFiniteLossError(
            f"{what} at step {pending.step}; last good checkpoint: "
            f"{'none' if good is None else f'step {good}'}; the batch's example numbers and all "
            f"metrics are in {path}. The same command resumes from that checkpoint; consider a "
            "lower --config.optimizer.learning_rate or --config.optimizer.clip_norm, with "
            "--config.checkpoint.accept_changes=True"
        )

    def _save_is_due(self, done: int) -> bool:
        config = self._config.checkpoint
        intervals = [every for every in (config.every_steps, config.keep_every) if every]
        due = done == self._config.total_steps or any(done % every == 0 for every in intervals)
        return due or self._best.step == done or self._best.exhausted

    def _save(self, done: int, state: TrainState, batch: DeviceBatch) -> None:
        with self._watchdog.phase("saving", f"step {done}"):
            # Reading the metrics also waits for all processes, but could not name missing ones.
            barrier("saving", self._config.distributed.barrier_timeout)
            self._read_metrics()  # never save parameters that a NaN has reached
            # a run that resumes there continues their records
            self._give(lambda writer: writer.save())
            self._checkpoints.keep(self._best.step)
            self._checkpoints.save(done, state, batch.data_state, self._best.state())

    def _validation_is_due(self, done: int) -> bool:
        every = self._config.data.validation_every_steps
        due = done % every == 0 or done == self._config.total_steps
        return self._validate is not None and due

    def _run_validation(self, state: TrainState, locked: Leaves, done: int) -> None:
        assert self._validate is not None
        with self._watchdog.phase("evaluation", f"validation after step {done}"):
            self._validated = self._validate(state, locked)
        self._write(done, self._validated)
        self._best.observe(done, self._validated, VALIDATION)
        self._progress.note(validation_line(done, self._validated))

    def _evaluation_is_due(self, done: int) -> bool:
        every = self._config.evaluation.every_steps
        # The evaluation after the last step is the run's result, too late to select a step.
        last = done == self._config.total_steps and self._best.kind != EVALUATION
        return bool(every and done % every == 0 and not last)

    def _run_evaluation(self, state: TrainState, done: int) -> bool:
        """Evaluates and logs; returns False if a stop was requested before the end."""
        self._progress.end()
        try:
            with self._watchdog.phase("evaluation", f"after step {done}"):
                values = self._evaluate(state, done)
        except Stopped:
            return False
        self._write(done, values)
        self._best.observe(done, values, EVALUATION)
        return True

    def _write(self, done: int, values: dict[str, float]) -> None:
        self._give(lambda writer: writer.write(done, values))

    def _give(self, action: Callable[[Writer], None]) -> None:
        """Applies an action to all sinks; if one fails, the run saves and stops."""
        for writer in self._writers:
            try:
                action(writer)
            except OSError as error:
                if self._failure is None:
                    self._stop.request()
                self._failure = self._failure or error


class _Clock:
    """Measures pairs per second, seconds per step and the share of time spent waiting for data."""

    def __init__(self, global_batch_size: int, batches: DeviceInput):
        self._size = global_batch_size
        self._batches = batches
        self._step: int | None = None
        self.seconds_per_step = float("inf")
        self.restart()

    def restart(self, done: int | None = None) -> None:
        """Excludes the time before now, and the steps before `done`."""
        self._start = time.perf_counter()
        self._batches.reset_wait()
        if done is not None and self._step is not None:
            self._step = done

    def lap(self, done: int) -> dict[str, float]:
        """Returns statistics since the last lap; the first, with the compilation, has no times."""
        seconds = time.perf_counter() - self._start
        waited = self._batches.reset_wait()
        previous, self._step = self._step, done
        self._start = time.perf_counter()
        counts = {"skipped": self._batches.skipped, "tokens_cut": self._batches.tokens_cut}
        skipped = {name: float(count) for name, count in counts.items() if count}
        if self._batches.left_out is not None:
            skipped["left_out"] = self._batches.left_out
        if previous is None or done == previous:
            return skipped
        self.seconds_per_step = seconds / (done - previous)
        return {
            "examples_per_second": self._size / self.seconds_per_step,
            "seconds_per_step": self.seconds_per_step,
            "data_wait": min(waited / seconds, 1.0),
        } | skipped
