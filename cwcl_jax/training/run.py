"""A run from settings to results: prepare, train, evaluate, write down."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cwcl_jax.cli import DONE, PREEMPTED
from cwcl_jax.config import ConfigError, ExperimentConfig, config_hash
from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.checks import check_inputs
from cwcl_jax.training.distributed import StopSignal, check_agreement, is_primary
from cwcl_jax.training.embedding import check_embeddings
from cwcl_jax.training.encode import EncodeFunctions, Encoder
from cwcl_jax.training.evaluator import Evaluator
from cwcl_jax.training.features import training_source
from cwcl_jax.training.input import Batches, DeviceInput
from cwcl_jax.training.loop import Loop
from cwcl_jax.training.metrics import Progress, make_writers
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
from cwcl_jax.training.summary import tower_table
from cwcl_jax.training.workdir import (
    check_same_data,
    check_same_run,
    check_same_sources,
    environment,
    write_records,
)


def train(config: ExperimentConfig, workdir: Path) -> int:
    """Trains in `workdir`, or resumes what it holds; returns the exit code.

    Raises:
      ConfigError: settings, data or weights that cannot work, before anything is computed.
      NonFiniteLossError: the loss diverged.
    """
    check_same_run(workdir, config)
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    evaluator = Evaluator(config, workdir)
    with (
        _open_batches(config) as batches,
        Checkpoints(workdir / "checkpoints", config.checkpoint) as checkpoints,
    ):
        start = checkpoints.latest_step or 0
        if start >= config.total_steps and evaluator.has_results():
            say(f"{workdir} is complete ({start} steps). Its results:\n")
            say(evaluator.saved_table())
            return DONE
        check_inputs(config)
        evaluator.check_sources()
        check_same_data(workdir, batches.fingerprint(), config)
        check_agreement(
            {
                "settings": config_hash(config),
                "packages": json.dumps(environment()["packages"]),
                "training data": json.dumps(batches.fingerprint(), sort_keys=True, default=str),
                "first step": str(start),
            }
        )
        state, locked, sources = _start_state(blueprint, checkpoints, batches, start)
        check_same_sources(workdir, sources, config)
        check_embeddings(blueprint, getattr(batches, "source", None), sources)
        if is_primary():
            write_records(workdir, config, sources, _trained(blueprint), batches.fingerprint())
        say(tower_table(blueprint))
        say(f"workdir {workdir}" + (f", resuming after step {start}" if start else "") + "\n")
        state, finished = _fit(blueprint, workdir, checkpoints, batches, evaluator, state, locked)
        if not finished:
            say(f"stopped after step {int(state.step)}, saved; the same command resumes")
            return PREEMPTED
    _finish(blueprint, workdir, evaluator, state, locked)
    return DONE


@contextmanager
def _open_batches(config: ExperimentConfig) -> Iterator[Batches]:
    import jax

    try:
        batches = train_batches(
            config.data,
            config.modalities,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            source=training_source(config),
        )
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            f"config.data.train={config.data.train!r}: {error}; set --config.data.train=..."
        ) from error
    try:
        yield batches
    finally:
        batches.close()


def _start_state(
    blueprint: Blueprint, checkpoints: Checkpoints, batches: Batches, start: int
) -> tuple[TrainState, Leaves, dict[str, TowerSource]]:
    """The state of step `start`, with `batches` moved to its position."""
    if not start:
        return initialise(blueprint)
    state, data_state = checkpoints.restore(start, blueprint.abstract_state())
    batches.set_state(data_state)
    return state, *locked_leaves(blueprint)


def _trained(blueprint: Blueprint) -> dict[str, list[str]]:
    """Paths of the trained leaves by tower."""
    return {
        modality: sorted(p for p in blueprint.trained if p.startswith(f"towers/{modality}/"))
        for modality in blueprint.config.towers
    }


def _fit(
    blueprint: Blueprint,
    workdir: Path,
    checkpoints: Checkpoints,
    batches: Batches,
    evaluator: Evaluator,
    state: TrainState,
    locked: Leaves,
) -> tuple[TrainState, bool]:
    config = blueprint.config
    start = int(state.step)
    functions = EncodeFunctions(blueprint)

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        return evaluator.run(Encoder(functions, state.params, locked, step))

    writers = make_writers(workdir, config, start) if is_primary() else []
    device_input = DeviceInput(batches, blueprint.mesh, depth=config.data.prefetch)
    loop = Loop(
        config,
        workdir,
        step=TrainStep(blueprint),
        checkpoints=checkpoints,
        writers=writers,
        progress=Progress(config.total_steps),
        evaluate=evaluate,
    )
    try:
        with StopSignal() as stop:
            return loop.run(state, locked, start, device_input, stop)
    finally:
        device_input.close()
        for writer in writers:
            writer.close()


def _finish(
    blueprint: Blueprint, workdir: Path, evaluator: Evaluator, state: TrainState, locked: Leaves
) -> None:
    """Evaluates the end of the run; writes and prints the results."""
    step = int(state.step)
    encoder = Encoder(EncodeFunctions(blueprint), state.params, locked, step)
    table = evaluator.run_and_write(encoder)
    if is_primary():
        plot_losses(workdir / "metrics.jsonl", workdir / "losses.png")
        say("\n" + table)
        say(f"\nresults, metrics and plots are in {workdir}")


def say(text: str) -> None:
    """A line for the person who watches, from one process only."""
    if is_primary():
        print(text, file=sys.stdout, flush=True)
