"""Users' code that a run names: recorded at its start, and compared when the run is resumed.

code.json holds name -> hash by the code's use: "towers" (encoders and modalities), "loss" (losses
and weight functions), "data" (sources and composers of batches).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from cwcl_jax.config import ExperimentConfig
from cwcl_jax.data.composers import own_composer
from cwcl_jax.data.sources import own_kinds
from cwcl_jax.evaluation.tasks.base import Task
from cwcl_jax.extension import code_hash, is_reference
from cwcl_jax.training.workdir import read_record, refuse_change, write_json

_FILE = "code.json"
ALL = ("towers", "loss", "data")


def code_of(config: ExperimentConfig, parts: Collection[str] = ALL) -> dict[str, dict[str, str]]:
    """Returns the code that a run's numbers depend on: name -> hash, by its use.

    Args:
      parts: members of `ALL`; the code of others is not imported.
    """
    towers = config.towers.values()
    named = {
        "towers": lambda: [name for tower in towers for name in (tower.modality, tower.encoder)],
        "loss": lambda: [config.loss.name, config.loss.weight_function],
        "data": lambda: [
            *own_kinds(config.data.train),
            *own_kinds(config.data.validation),
            *own_composer(config.data.batches),
        ],
    }
    return {part: _hashes(named[part]()) for part in parts}


def code_of_tasks(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Returns name -> hash of user-defined tasks, and of the sources that tasks read."""
    lines = [getattr(t, f, "") for t in tasks.values() for f in ("source", "train_source")]
    kinds = [kind for line in lines if line for kind in own_kinds(line)]
    return _hashes([*(task.kind for task in tasks.values()), *kinds])


def write_code(workdir: Path, config: ExperimentConfig) -> None:
    """Records the code of a run, if it names any."""
    found = code_of(config)
    if any(found.values()) or (workdir / _FILE).exists():
        write_json(workdir / _FILE, found)


def check_same_code(
    workdir: Path, config: ExperimentConfig, parts: Collection[str], way_out: str
) -> None:
    """Raises ConfigError if code changed since the run began.

    Args:
      parts: the members of `ALL` that matter here.
      way_out: alternatives to restoring the code.
    """
    path = workdir / _FILE
    if not path.exists():
        return
    recorded, now = read_record(path), code_of(config, parts)
    changed = [
        name
        for part in parts
        for name in sorted({*recorded.get(part, {}), *now[part]})
        if recorded.get(part, {}).get(name) != now[part].get(name)
    ]
    if changed:
        refuse_change(
            f"the code of {', '.join(changed)} changed since the run in {workdir} began",
            f"restore it, {way_out}",
            config,
        )


def _hashes(names: Iterable[str]) -> dict[str, str]:
    return {name: code_hash(name) for name in sorted(set(names)) if is_reference(name)}
