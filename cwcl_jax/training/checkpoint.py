"""Checkpoints of a run through orbax: trained leaves, optimizer state and the data's position.

Locked leaves are not saved: their source and hash are in the run's `towers.json`. Only this module
and `stores` import orbax.

Neither orbax nor the file format verifies what it reads: a flipped bit would be restored silently.
Each checkpoint therefore holds a digest of every leaf and of its own metadata, which is verified
when it is restored.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from cwcl_jax.config import ConfigError
from cwcl_jax.paths import StorePath, is_url, to_path
from cwcl_jax.training.coordination import gather
from cwcl_jax.training.digest import digests
from cwcl_jax.training.options import CheckpointConfig
from cwcl_jax.training.state import TrainState
from cwcl_jax.training.stores import prepare

# Folder next to the checkpoints, for those that were found damaged.
_SET_ASIDE = "damaged"


class DamagedCheckpointError(ConfigError):
    """The files on disk are not what was saved; the message names the step and the remedy."""


class Checkpoints:
    """The checkpoints of one run, by step.

    Saves are atomic: a run that is killed during a save leaves a temporary folder that is ignored.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
        if read_only and not directory.is_dir():
            raise FileNotFoundError(f"{directory} does not exist: nothing was saved yet")
        prepare(directory)
        self._asynchronous = config.asynchronous
        self._pending: Any = None
        self._kept = _KeptStep()
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.absolute()),
            preservation_policy=_preservation_policy(config, self._kept),
            # A reader must not remove what a running training is just writing.
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

    def keep(self, step: int | None) -> None:
        """Keeps one additional step, replacing the previous one."""
        self._kept.step = step

    def save(
        self,
        step: int,
        state: TrainState,
        data_state: dict[str, Any],
        best: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state`; returns once device memory may be reused, files may follow later.

        Args:
          step: number of steps done.
          state: global arrays.
          data_state: JSON-able position of the data, equal on all processes.
          best: state of the best step, JSON-able and equal on all processes.
        """
        self.wait()
        self._require_folder()
        parts = _checkpointables(state)
        metadata = {"data": data_state, "digests": digests(_leaves(parts))}
        self._pending = self._checkpointer.save_checkpointables_async(
            step,
            parts,
            custom_metadata=_sealed(metadata | ({"best": dict(best)} if best else {})),
            force=True,
        )
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises its errors."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except Exception:
                self._require_folder()
                raise

    def _require_folder(self) -> None:
        """Raises FileNotFoundError if the run's folder is no longer in its place.

        Creating it again would distribute the run over two folders.
        """
        directory = to_path(self._checkpointer.directory)
        if not is_url(directory) and not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} no longer exists: the workdir was moved or removed during the run. "
                "Earlier checkpoints are in the folder that it was moved to: the same command with "
                "that --workdir continues from the newest of them"
            )

    def restore(self, step: int, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and data position of `step`.

        Args:
          target: ShapeDtypeStructs with the shardings wanted now. The number of devices or
              processes may differ from that of the save.

        Returns:
          The state, without averages (`ema`) if the run kept none then, and the position.

        Raises:
          FileNotFoundError: no such step.
          DamagedCheckpointError: it is not what was saved.
          ConfigError: its leaves differ from those of the settings.
          OSError: it cannot be read at the moment.
        """
        if target.ema and not self._holds_ema(step):
            target = dataclasses.replace(target, ema={})
        loaded, data_state = self._load(step, _checkpointables(target))
        optional = {name: loaded.get(name, {}) for name in ("statistics", "ema")}
        return TrainState(params=loaded["params"], **loaded["rest"], **optional), data_state

    def best(self, step: int | None = None) -> dict[str, Any] | None:
        """Returns a checkpoint's state of the best step; None if it has none.

        Args:
          step: step of the checkpoint; by default the latest that can be read.
        """
        for number in reversed(self.steps) if step is None else [step]:
            if metadata := self._metadata(number):
                return metadata.get("best")
        return None

    def _holds_ema(self, step: int) -> bool:
        """Returns whether a step has averages; True for damaged metadata, which `_load` reports."""
        metadata = self._metadata(step)
        return metadata is None or any(
            path.startswith("ema/") for path in metadata.get("digests", {})
        )

    def _metadata(self, step: int) -> dict[str, Any] | None:
        """Returns the metadata of a step; None if they cannot be read."""
        try:
            metadata: Any = self._checkpointer.metadata(step).custom_metadata
            _check_seal(metadata)
        except (KeyError, TypeError, ValueError, RuntimeError, OSError):
            return None
        return metadata

    def restore_newest(
        self, target: TrainState, *, timeout: float, warn: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns state and data position of the newest intact step; all processes agree on it.

        Damaged newer steps are moved into the folder `damaged` next to the checkpoints.

        Args:
          timeout: seconds to wait for other processes.
          warn: called with a message for each damaged step.

        Raises the same errors as `restore`; DamagedCheckpointError if no step is intact.
        """
        damage, damaged = "", []
        for step in reversed(self.steps):
            restored, damage = None, ""
            try:
                restored = self.restore(step, target)
            except DamagedCheckpointError as error:
                damage = str(error)
            damage = max(gather(f"restored step {step}", damage, timeout))
            if restored is not None and not damage:
                self._set_aside(damaged, timeout)
                return restored
            warn(f"warning: {damage}")
            damaged.append(step)
        raise DamagedCheckpointError(
            f"no checkpoint in {self._checkpointer.directory} is intact ({damage}); restore the "
            "folder from a copy, or give a new --workdir to start again"
        )

    def _set_aside(self, steps: list[int], timeout: float) -> None:
        """Moves damaged steps away, because the run will save these steps again."""
        if not steps:
            return
        directory = to_path(self._checkpointer.directory)
        if jax.process_index() == 0:
            for step in steps:
                (directory.parent / _SET_ASIDE).mkdir(exist_ok=True)
                aside = _unused(directory.parent / _SET_ASIDE, step)
                (directory / str(step)).replace(aside)
        gather("damaged steps moved", "", timeout)
        self._checkpointer.reload()

    def restore_model(
        self, step: int, target: TrainState, weights: str = "trained"
    ) -> dict[str, Any]:
        """Returns only the leaves of the model at `step`, with the shardings of `target`.

        Args:
          weights: "trained", or "ema" for their averages.

        Raises the same errors as `restore`; ConfigError if there are no averages.
        """
        trained = {"trained": "params", "ema": "ema"}[weights]
        if trained == "ema" and not (target.ema and self._holds_ema(step)):
            raise ConfigError(
                f"{self._checkpointer.directory}/{step} holds no averages for weights=ema: a run "
                "has them only if config.optimizer.ema_decay is set"
            )
        parts = _checkpointables(target)
        wanted = {name: parts[name] for name in (trained, "statistics") if name in parts}
        loaded, _ = self._load(step, wanted)
        return {**loaded[trained], **loaded.get("statistics", {})}

    def _load(self, step: int, targets: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the verified parts of a checkpoint that `targets` name, and the data's position.

        Raises the same errors as `restore`.
        """
        if step not in self.steps:
            raise FileNotFoundError(
                f"{self._checkpointer.directory} holds no checkpoint of step {step}; it holds "
                f"{self.steps or 'none'}"
            )
        try:
            saved: Any = self._checkpointer.checkpointables_metadata(step).metadata or {}
            if missing := [name for name in targets if not saved.get(name)]:
                raise ValueError(f"the list of its {missing[0]} cannot be read")
            _check_leaves({name: saved[name] for name in targets}, targets)
            loaded = self._checkpointer.load_checkpointables(step, targets)
            metadata: Any = self._checkpointer.metadata(step).custom_metadata
            _check_seal(metadata)
            _check_digests(loaded, metadata.get("digests"))
            return loaded, metadata["data"]
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            _read_everything(to_path(self._checkpointer.directory) / str(step))
            raise self._damaged(step, _reason(error)) from error

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        others = [other for other in self.steps if other != step]
        newest = max((other for other in others if other < step), default=max(others, default=None))
        return DamagedCheckpointError(
            f"the checkpoint {self._checkpointer.directory}/{step} is damaged ({reason}); "
            + (
                f"the newest other step is {newest}: `train` resumes from it automatically, other "
                f"commands need --step={newest}"
                if newest is not None
                else "there is no other step"
            )
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
    """Returns the parts of a checkpoint; empty statistics and averages are left out."""
    parts = {"params": state.params, "rest": {"step": state.step, "opt_state": state.opt_state}}
    optional = {"statistics": state.statistics, "ema": state.ema}
    return parts | {name: leaves for name, leaves in optional.items() if leaves}


def _leaves(parts: Any) -> dict[str, Any]:
    """Returns path -> leaf of a checkpoint's parts."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(parts)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the metadata with their own checksum."""
    return metadata | {"crc32": _crc32(metadata)}


def _crc32(metadata: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(metadata, sort_keys=True).encode())


def _check_seal(metadata: Any) -> None:
    """Raises ValueError if metadata are not what was saved."""
    if not metadata or "data" not in metadata:
        raise ValueError("the position of the data is missing")
    content = {name: value for name, value in metadata.items() if name != "crc32"}
    if metadata != {"data": metadata["data"]} and metadata.get("crc32") != _crc32(content):
        raise ValueError("its metadata have changed since they were saved")


def _check_digests(loaded: dict[str, Any], saved: Mapping[str, int] | None) -> None:
    """Raises ValueError if a leaf is not what was saved."""
    if saved is None:  # a checkpoint of an earlier version without digests
        return
    found = digests(_leaves(loaded))
    bad = sorted(path for path, value in found.items() if saved.get(path) != value)
    if bad:
        more = f" and {len(bad) - 1} more leaves" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more} differ from their checksum")


def _unused(folder: Path, step: int) -> Path:
    """Returns an unused path for a step in `folder`."""
    number, path = 1, folder / str(step)
    while path.exists():
        number, path = number + 1, folder / f"{step}.{number}"
    return path


def _read_everything(folder: Path) -> None:
    """Reads every file of a checkpoint, because orbax's errors do not tell damage from I/O errors.

    Raises:
      OSError: a file or folder cannot be read at the moment. The error names it.
    """

    if isinstance(folder, StorePath):
        for path in folder.files():
            path.read_bytes()
        return

    def fail(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in names):
            try:
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error


class _KeptStep:
    """A preservation policy of orbax that keeps one step, which may change."""

    step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns which checkpoints are kept, by their attribute `step`."""
        del context
        return [checkpoint.step == self.step for checkpoint in checkpoints]


def _preservation_policy(config: CheckpointConfig, one: _KeptStep) -> Any:
    """Returns the policy for keeping checkpoints; Any: orbax's policies do not fit its protocol."""
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep or None), one]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    return policies.AnyPreservationPolicy(kept)


def _check_leaves(saved: Any, wanted: Any) -> None:
    """Raises ConfigError if a checkpoint's leaves are not those that the settings require."""
    then, now = _shapes(saved), _shapes(wanted)
    changed = sorted(path for path in {*then, *now} if then.get(path) != now.get(path))
    if changed:
        first = changed[0]
        raise ConfigError(
            f"the leaves of the settings differ from the checkpoint's: {first} is "
            f"{then.get(first, 'missing')} there and {now.get(first, 'missing')} in the settings"
            f"{f', and {len(changed) - 1} more' if len(changed) > 1 else ''}. Such a change cannot "
            "be resumed: undo it, or give a new --workdir and start from the run's weights "
            "(python -m cwcl_jax.export, then --config.towers.<modality>.weights=FILE)"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns path -> shape of every leaf."""
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree).items()}


def _reason(error: BaseException) -> str:
    """Returns the first line of the root cause; orbax's last error names only its handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def _leave_preemption_alone(checkpointer: Any) -> None:
    """Stops orbax from asking jax whether a preemption is due.

    orbax asks in every save, with the step number, only for its statistics, and again from a thread
    when the files are written. jax derives the call at which all processes stop from the latest
    number that each process passed, and these numbers must be consecutive (`stopping.StopSignal`).
    With orbax's numbers in between, a request could be lost.
    """
    checkpointer._manager.reached_preemption = lambda step: False
