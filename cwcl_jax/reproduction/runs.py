"""Training runs as processes: started, resumed after a kill, or reused if complete."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig, from_config_dict
from cwcl_jax.files import write_text
from cwcl_jax.pretrained.folder import DESCRIPTION
from cwcl_jax.reproduction.processes import run_process

_RECORD = "reproduce.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of one seed.

    Attributes:
      name: name of its folder, without the seed.
      file: the config file.
      argument: argument of the config file; `{init}` stands for the folder of the run `after`.
      options: further command-line options.
      after: a run whose speech encoder this one starts from.
    """

    name: str
    file: str
    argument: str = ""
    options: tuple[str, ...] = ()
    seed: int = 0
    after: Run | None = None

    def folder(self, root: Path) -> Path:
        """Returns the folder that it trains in."""
        return root / f"{self.name}-seed{self.seed}"

    def command(self, root: Path) -> list[str]:
        """Returns the command that trains, resumes, or reports that the run is complete."""
        argument = self.argument
        if self.after is not None:
            argument = argument.format(init=self.after.folder(root))
        config = f"{self.file}:{argument}" if argument else self.file
        return [
            "python", "-m", "cwcl_jax.train", f"--config={config}",
            f"--workdir={self.folder(root)}", f"--config.seed={self.seed}", *self.options,
        ]  # fmt: skip

    def export_command(self, root: Path) -> list[str]:
        """Returns the command that exports its model, for runs that start from it."""
        source = self.folder(root)
        return [
            "python", "-m", "cwcl_jax.export",
            f"--source={source}", f"--output={source / 'export'}", "--format=safetensors",
        ]  # fmt: skip


class RunMaker:
    """Carries out runs one after the other, each once.

    Attributes:
      root: the folder of the runs' folders.
      commands: commands of all needed runs, in order, including those that were complete before.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = print):
        self.root = root
        self.commands: list[list[str]] = []
        self._say = say
        self._done: dict[Path, float] = {}

    @property
    def folders(self) -> list[Path]:
        """Folders of all needed runs, in order."""
        return list(self._done)

    @property
    def seconds(self) -> float:
        """Seconds of all needed runs."""
        return sum(self._done.values())

    def complete(self, run: Run) -> Path:
        """Runs a run unless it is complete; returns its folder.

        Raises:
          ConfigError: the run's settings are invalid.
          RuntimeError: it failed; the message names its log.
          SystemExit: it was stopped, with its exit code; the same command continues it.
        """
        folder = run.folder(self.root)
        if folder in self._done:
            return folder
        if run.after is not None:
            self._export(run.after)
        command = run.command(self.root)
        self.commands.append(command)
        record = _read(folder / _RECORD)
        same = _normalised(record.get("command", [])) == _normalised(command)
        if same and record.get("complete"):
            self._say(f"{folder}: complete, reused")
        else:
            spent = record.get("seconds", 0.0) if same else 0.0
            record = {"command": command, "seconds": spent, "complete": False}
            self._train(folder, record)
        self._done[folder] = record["seconds"]
        return folder

    def _export(self, run: Run) -> None:
        folder = self.complete(run)
        command = run.export_command(self.root)
        if command not in self.commands:
            self.commands.append(command)
        if not (folder / "export" / DESCRIPTION).exists():
            self._process(folder, command)

    def _train(self, folder: Path, record: dict) -> None:
        start = time.perf_counter()
        try:
            self._process(folder, record["command"])
            record["complete"] = True
        finally:
            # Refused settings trained nothing: the folder and its record belong to another run.
            if not isinstance(sys.exception(), ConfigError):
                record["seconds"] += time.perf_counter() - start
                write_text(folder / _RECORD, json.dumps(record, indent=1) + "\n")
        self._say(f"{folder}: {record['seconds']:.0f} s")

    def _process(self, folder: Path, command: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "reproduce.log"
        self._say(f"{folder}: {shlex.join(command)}")
        code = run_process(command, log)
        if code == cli.PREEMPTED:
            raise SystemExit(code)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
            # An error in the settings is the last line; other failures may need more lines.
            told = " / ".join(lines[-1:] if code == cli.BAD_CONFIG else lines[-3:])
            if "--workdir" in told:
                told += " (here that is another --runs)"
            message = f"the run in {folder} ended with code {code} (log: {log}): {told}"
            raise ConfigError(message) if code == cli.BAD_CONFIG else RuntimeError(message)


def _read(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is incomplete: delete it; the run in its folder then continues"
        ) from error


def _normalised(command: Sequence[str]) -> list[str]:
    """Returns a command with the entries of its config's argument sorted by name."""
    return [_sorted_entries(part) if part.startswith("--config=") else part for part in command]


def _sorted_entries(option: str) -> str:
    file, _, argument = option.partition(":")
    # Entries of one name stay in order, because the last of them applies.
    entries = sorted(argument.split(","), key=lambda entry: entry.partition("=")[0])
    return f"{file}:{','.join(entries)}"


def load_experiment(file: str, argument: str = "") -> ExperimentConfig:
    """Returns the settings of a config file for an argument."""
    if not Path(file).is_file():
        raise ConfigError(f"{file}: there is no such file; run this in the project's folder")
    return from_config_dict(runpy.run_path(file)["get_config"](argument))
