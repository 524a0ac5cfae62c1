"""The folder of a run: resolved settings, environment, sources of the locked towers.

config.json       resolved settings
environment.json  versions and devices of the last start
towers.json       source and sha256 of each tower's weights, trained leaves by tower
code.json         hashes of users' code that the run names (see `own_code`)
data.json         fingerprint of the training data
metrics.jsonl     one record per logged step
checkpoints/      trained leaves, optimizer state, data position
results.json, results.md, plots/   results of the evaluation
evaluated.json    step and settings that these results belong to
lock              held by the run that is using the folder
place             only on an object store: written to test access
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from cwcl_jax.config import (
    ConfigError,
    ExperimentConfig,
    from_json,
    to_json,
    to_plain,
)
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.exit_codes import MISTAKES
from cwcl_jax.extension import is_missing_code
from cwcl_jax.files import InUse, locked, parse_json, write_text
from cwcl_jax.paths import CHECKPOINT_SCHEMES, StorePath, is_url
from cwcl_jax.training.changes import changed_fields, tell_changes
from cwcl_jax.training.state import TowerSource

# Settings that may differ between two starts of a run without changing its numbers.
_FREE = (
    "config.name",
    "config.checkpoint.",
    "config.logging.",
    "config.mesh.",
    "config.distributed.",
    "config.evaluation.",
    "config.data.cache_dir",
    "config.data.max_skipped_share",
    "config.data.threads",
    "config.data.validation_every_steps",
    "config.data.prefetch",
    "config.profile",
)
# These change memory, but not the function of the leaves.
_FREE_IN_TOWERS = (".remat", ".attention")
_PACKAGES = (
    "cwcl_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "transformers",
    "ml_collections",
    "numpy",
    "pillow",
)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_record(path: Path) -> Any:
    """Returns the content of a JSON file; raises ConfigError if it is not JSON."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged ({error}); remove it: the next start of the run writes it again"
        ) from error


def check_place(workdir: Path, config: ExperimentConfig) -> None:
    """Raises ConfigError if the folder is on an object store that cannot hold a run.

    Local folders are not checked.
    """
    if not isinstance(workdir, StorePath):
        return
    if workdir.scheme not in CHECKPOINT_SCHEMES:
        raise ConfigError(
            f"--workdir={workdir}: checkpoints can be written only to "
            f"{' and '.join(CHECKPOINT_SCHEMES)}; give one of these or a local folder, or mount "
            "the store"
        )
    if config.profile:
        raise ConfigError(
            f"config.profile={config.profile!r}: a trace cannot be written to --workdir={workdir}; "
            "profile a run with a local --workdir"
        )
    try:
        workdir.exists()
        (workdir / "place").write_bytes(b"A run is or was begun here.\n")
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(f"{workdir}: ")
        raise ConfigError(f"--workdir={workdir}: {reason}") from error


@contextmanager
def made_folder(workdir: Path) -> Iterator[None]:
    """Creates the folder of a run, and removes it again if the start is refused.

    Only folders that did not exist before are removed, and only if nothing was written into them
    but the lock. On an object store nothing is removed.

    Raises:
      ConfigError: it cannot be created.
    """
    new = _make(workdir)
    try:
        yield
    except MISTAKES:
        if new:
            _remove(new)
        raise


def _remove(new: Sequence[Path]) -> None:
    """Removes a run's folder and parents, the deepest first, if there is no file but the lock."""
    lock = new[0] / "lock"
    # The lock, because another run may have begun in the folder meanwhile.
    with suppress(OSError, InUse), locked(lock):
        if not any(path != lock and not path.is_dir() for path in new[0].rglob("*")):
            shutil.rmtree(new[0])
            for folder in new[1:]:
                folder.rmdir()


def _make(workdir: Path) -> list[Path]:
    """Creates the folder and its parents; returns those that did not exist, the deepest first."""
    try:
        new = [p for p in (workdir, *workdir.parents) if not (is_url(p) or p.exists())]
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise ConfigError(
            f"--workdir={workdir} cannot be created: {error.strerror}; give another --workdir"
        ) from error
    return new


@contextmanager
def only_user(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the folder, because two would write the same checkpoints and records.

    Raises:
      ConfigError: another run is using it, or nothing can be written there. On a file system that
        is mounted read-only nobody writes, and a complete run can be shown.
    """
    _make(workdir)
    path = workdir / "lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except PermissionError as error:
            raise ConfigError(f"{path} cannot be written; give another --workdir") from error
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        except InUse as error:
            raise ConfigError(
                f"another run is using {workdir} ({error}); wait for its end, stop it, or give "
                "another --workdir"
            ) from error
        yield


def load_config(workdir: Path) -> ExperimentConfig:
    """Returns the resolved settings of a run.

    Raises:
      ConfigError: `workdir` is not the folder of a run, or it was written by another version of the
          package and cannot be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(f"{workdir} is not the folder of a run: it has no config.json")
    try:
        return _accepting_nothing(from_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        if is_missing_code(error):
            raise ConfigError(f"{path} names code that cannot be imported: {error}") from error
        raise ConfigError(
            f"{path} does not fit this version of the package: {error}; use the version that wrote "
            "it (environment.json), or another --workdir"
        ) from error


def _accepting_nothing(config: ExperimentConfig) -> ExperimentConfig:
    checkpoint = dataclasses.replace(config.checkpoint, accept_changes=False)
    return dataclasses.replace(config, checkpoint=checkpoint)


def refuse_change(told: str, way_out: str, config: ExperimentConfig) -> None:
    """Raises ConfigError for a change of a run, or reports that it is accepted.

    Args:
      told: what changed.
      way_out: what the user can do.
      config: the config of this start.
    """
    if not config.checkpoint.accept_changes:
        raise ConfigError(f"{told}; {way_out}")
    if jax.process_index() == 0:
        print(f"accepted by config.checkpoint.accept_changes, this once: {told}", flush=True)


def check_same_run(workdir: Path, config: ExperimentConfig) -> None:
    """Raises ConfigError if `workdir` holds a run with other settings that matter."""
    if not (workdir / "config.json").exists():
        return
    try:
        old = load_config(workdir)
    except ConfigError:
        if config.checkpoint.accept_changes:  # written by a version that this one cannot read
            return
        raise
    changed = {
        path: values
        for path, values in changed_fields(old, config).items()
        if not (path.startswith(_FREE) or path.endswith(_FREE_IN_TOWERS))
    }
    if changed:
        told = f"{workdir} holds a run with other settings ({tell_changes(changed)})"
        way_out = (
            "give another --workdir, or resume with the new settings by "
            "--config.checkpoint.accept_changes=True"
        )
        if not steps_saved(workdir):
            told += " of which no step was saved"
            way_out = f"delete it, {way_out.replace('resume', 'start')}"
        refuse_change(told, way_out, config)


def steps_saved(workdir: Path) -> int:
    """Returns the last step that seems to have a checkpoint; 0 if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def check_same_sources(
    workdir: Path, sources: Mapping[str, TowerSource], config: ExperimentConfig
) -> None:
    """Raises ConfigError if a tower's file is not the one that the run began with."""
    path = workdir / "towers.json"
    if not path.exists():
        return
    recorded = read_record(path)
    for modality, source in sources.items():
        old = recorded.get(modality, {})
        if old.get("sha256", "") != source.sha256:
            refuse_change(
                f"the {modality} tower's weights changed since the run in {workdir} began: "
                f"{old.get('source')} (sha256 {old.get('sha256', '')[:12]}) then, {source.source} "
                f"(sha256 {source.sha256[:12]}) now",
                "restore the file, give another --workdir, or set "
                "--config.checkpoint.accept_changes=True",
                config,
            )


def check_same_data(
    workdir: Path, fingerprint: Mapping[str, Any], config: ExperimentConfig
) -> None:
    """Raises ConfigError if the training data is not what the run began with."""
    path = workdir / "data.json"
    if not path.exists() or not steps_saved(workdir):  # nothing was learnt from other data
        return
    old = _of_today(read_record(path))
    changed = changed_fields(old, json.loads(json.dumps(fingerprint)), "data")
    if changed:
        refuse_change(
            f"the training data changed since the run in {workdir} began ({tell_changes(changed)})",
            "restore it, give another --workdir, or set --config.checkpoint.accept_changes=True",
            config,
        )


def _of_today(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an earlier version's fingerprint, with inputs by modality, in today's form."""
    if "modalities" not in fingerprint:
        return dict(fingerprint)
    old = dict(fingerprint)
    towers = old.pop("modalities")
    inputs = {tower: old.pop(tower) for tower in towers if tower in old}
    if "tokenizer" in old:
        inputs["text"]["vocabulary"] = old.pop("tokenizer")
    return old | {"towers": towers, "inputs": inputs}


def write_records(
    workdir: Path,
    config: ExperimentConfig,
    sources: Mapping[str, TowerSource],
    trained: Mapping[str, list[str]],
    fingerprint: Mapping[str, Any],
) -> None:
    """Writes config.json, environment.json, towers.json and data.json.

    `accept_changes` is not stored: it applies to one start, and would silence later changes.
    """
    write_text(workdir / "config.json", to_json(_accepting_nothing(config)))
    write_json(workdir / "environment.json", environment())
    towers = {
        modality: dataclasses.asdict(source) | {"trained": trained.get(modality, [])}
        for modality, source in sources.items()
    }
    write_json(workdir / "towers.json", towers)
    write_json(workdir / "data.json", dict(fingerprint))


def write_evaluated(
    workdir: Path,
    step: int,
    evaluation: EvaluationConfig,
    data: Mapping[str, Any],
    code: Mapping[str, str],
) -> None:
    """Records which step, settings, data and code the results in the folder belong to.

    Args:
      data: fingerprints by task.
      code: the tasks' own code, name -> hash.
    """
    write_json(workdir / "evaluated.json", _evaluated(step, evaluation, data, code))


def withdraw_evaluated(workdir: Path) -> None:
    """Removes the record before the results change.

    A run that dies then is evaluated again.
    """
    (workdir / "evaluated.json").unlink(missing_ok=True)


def is_evaluated(
    workdir: Path,
    step: int,
    evaluation: EvaluationConfig,
    data: Mapping[str, Any],
    code: Mapping[str, str],
) -> bool:
    """Returns whether the results belong to this step, these settings, data and code."""
    path = workdir / "evaluated.json"
    if not path.exists():
        return False
    record, now = read_record(path), _evaluated(step, evaluation, data, code)
    # An earlier version did not record the data, and missing files prove nothing.
    if not record.get("data") or not data:
        now["data"] = record["data"] = {}
    return not changed_fields(record, now)


def _evaluated(
    step: int, evaluation: EvaluationConfig, data: Mapping[str, Any], code: Mapping[str, str]
) -> dict[str, Any]:
    made = {"step": step, "evaluation": to_plain(evaluation), "data": dict(data)}
    return made | {"code": dict(code)} if code else made


def environment() -> dict[str, Any]:
    """Returns versions, devices and command of this start."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
    }
