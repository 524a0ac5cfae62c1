"""Checkpoints of a run through orbax: trained leaves, optimizer state and the data's position.

Locked leaves are not saved: their source and hash are in the run's `towers.json`. This is the
only module that imports orbax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cwcl_jax.config import ConfigError
from cwcl_jax.training.options import CheckpointConfig
from cwcl_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, by step.

    Saves are atomic: a run that is killed in a save leaves a temporary folder that is ignored.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
        if read_only and not directory.is_dir():
            raise FileNotFoundError(f"{directory} does not exist: nothing was saved yet")
        self._asynchronous = config.asynchronous
        self._pending: Any = None
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=_preservation_policy(config),
            # A reader must not remove what a run beside it is just writing.
            cleanup_tmp_directories=not read_only,
        )
        _leave_preemption_alone(self._checkpointer)

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves `state`; returns once device memory may be reused, files may follow later.

        Args:
          step: steps done.
          state: global arrays.
          data_state: JSON-able position of the data, equal on all processes.
        """
        self.wait()
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            _checkpointables(state),
            custom_metadata={"data": data_state},
            force=True,
        )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises what went wrong in it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position of `step`.

        Args:
          target: ShapeDtypeStructs with the shardings wanted now, which may belong to another
            number of devices or processes than the ones that saved.

        Raises:
          FileNotFoundError: no such step.
          ConfigError: the checkpoint is damaged, or holds other leaves than the settings want.
        """
        loaded = self._load(step, _checkpointables(target))
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        if not metadata or "data" not in metadata:
            raise self._damaged(step, "the position of the data is missing")
        statistics = loaded.get("statistics", {})
        state = TrainState(params=loaded["params"], **loaded["rest"], statistics=statistics)
        return state, metadata["data"]

    def restore_model(self, step: int, target: TrainState) -> dict[str, Any]:
        """Only the leaves of the model at `step`, into ShapeDtypeStructs with shardings.

        Raises as `restore` does.
        """
        wanted = {k: v for k, v in _checkpointables(target).items() if k != "rest"}
        loaded = self._load(step, wanted)
        return {**loaded["params"], **loaded.get("statistics", {})}

    def _load(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self._checkpointer.directory} holds no checkpoint of step {step}; it holds "
                f"{self.steps or 'none'}"
            )
        try:
            saved: Any = self._checkpointer.checkpointables_metadata(step).metadata or {}
            if missing := [name for name in targets if not saved.get(name)]:
                raise self._damaged(step, f"the list of its {missing[0]} cannot be read")
            _check_leaves({name: saved[name] for name in targets}, targets)
            return self._checkpointer.load_checkpointables(step, targets)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise self._damaged(step, _reason(error)) from error

    def _damaged(self, step: int, reason: str) -> ConfigError:
        earlier = [other for other in self.steps if other < step]
        return ConfigError(
            f"the checkpoint {self._checkpointer.directory}/{step} is damaged ({reason}); remove "
            "that folder, and the same command "
            + (f"goes on from step {earlier[-1]}" if earlier else "begins anew: there is no other")
        )

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _checkpointables(state: TrainState) -> dict[str, Any]:
    """The parts of a checkpoint. Most models have no statistics: their checkpoints name none."""
    parts = {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}
    return parts | ({"statistics": state.statistics} if state.statistics else {})


def _preservation_policy(config: CheckpointConfig) -> Any:
    """Which checkpoints stay. Any: orbax's policies do not satisfy its own protocol's type."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep or None)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    return policies.AnyPreservationPolicy(kept)


def _check_leaves(saved: Any, wanted: Any) -> None:
    """Raises ConfigError where a checkpoint's leaves are not those that the settings make."""
    then, now = _shapes(saved), _shapes(wanted)
    changed = sorted(path for path in {*then, *now} if then.get(path) != now.get(path))
    if changed:
        first = changed[0]
        raise ConfigError(
            f"the settings want other leaves than the checkpoint holds: {first} is "
            f"{then.get(first, 'missing')} there and {now.get(first, 'missing')} in the settings"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}. Such a change cannot "
            "be resumed: undo it, or give a new --workdir and begin from the run's weights "
            "(python -m cwcl_jax.export, then --config.towers.<modality>.weights=FILE)"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _reason(error: BaseException) -> str:
    """The beginning of what went wrong first; orbax's own last words name only its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _leave_preemption_alone(checkpointer: Any) -> None:
    """Keeps orbax from asking jax whether a preemption is due.

    It asks in every save, with the step's number, for its statistics alone, and again from a
    thread when the files are written. jax finds the call to stop at from the latest number that
    each process asked with, and the numbers must be consecutive (`stopping.StopSignal`): with
    orbax's between them a request could be lost.
    """
    checkpointer._manager.reached_preemption = lambda step: False
