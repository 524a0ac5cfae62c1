"""Checkpoints of a run through orbax: trained leaves, optimizer state and the data's position.

Locked leaves are not saved: their source and hash are in the run's `towers.json`. This is the
only module that imports orbax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

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
        # orbax's policies do not satisfy its own protocol's type.
        policy: Any = ocp.training.preservation_policies.LatestN(config.keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=policy,
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
            {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}},
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
        """
        rest = {"step": target.step, "opt_state": target.opt_state}
        loaded = self._load(step, {"params": target.params, "rest": rest})
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        return TrainState(params=loaded["params"], **loaded["rest"]), metadata["data"]

    def restore_params(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        """Only the trained leaves of `step`, into ShapeDtypeStructs with shardings."""
        return self._load(step, {"params": target})["params"]

    def _load(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self._checkpointer.directory} holds no checkpoint of step {step}; it holds "
                f"{self.steps or 'none'}"
            )
        return self._checkpointer.load_checkpointables(step, targets)

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


def _leave_preemption_alone(checkpointer: Any) -> None:
    """Keeps orbax from asking jax whether a preemption is due.

    It asks in every save, with the step's number, for its statistics alone, and again from a
    thread when the files are written. jax finds the call to stop at from the latest number that
    each process asked with, and the numbers must be consecutive (`stopping.StopSignal`): with
    orbax's between them a request could be lost.
    """
    checkpointer._manager.reached_preemption = lambda step: False
