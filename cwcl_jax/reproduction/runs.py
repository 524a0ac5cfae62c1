"""Training runs as processes: started, resumed after a kill, or reused when they are complete."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cwcl_jax import cli
from cwcl_jax.config import ConfigError, ExperimentConfig, from_config_dict

_RECORD = "reproduce.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of one seed.

    Attributes:
      name: of its folder, without the seed.
      file: the config file.
      argument: of the config file; `{init}` stands for the folder of the run `after`.
      options: further options of the command line.
      after: a run whose speech encoder this one starts from.
    """

    name: str
    file: str
    argument: str = ""
    options: tuple[str, ...] = ()
    seed: int = 0
    after: Run | None = None

    def folder(self, root: Path) -> Path:
        """Where it trains."""
        return root / f"{self.name}-seed{self.seed}"

    def command(self, root: Path) -> list[str]:
        """The command that trains, resumes, or says that the run is complete."""
        argument = self.argument
        if self.after is not None:
            argument = argument.format(init=self.after.folder(root))
        config = f"{self.file}:{argument}" if argument else self.file
        return [
            "python", "-m", "cwcl_jax.train", f"--config={config}",
            f"--workdir={self.folder(root)}", f"--config.seed={self.seed}", *self.options,
        ]  # fmt: skip


class Runner:
    """Carries out runs one after the other, each once."""

    def __init__(self, root: Path, say: Callable[[str], None] = print):
        self.root = root
        self._say = say
        self._done: dict[Path, float] = {}

    @property
    def seconds(self) -> float:
        """Of all runs that were needed, also of those that had been made before."""
        return sum(self._done.values())

    def complete(self, run: Run) -> Path:
        """The folder of the complete run.

        Raises:
          ConfigError: the run's settings cannot work.
          RuntimeError: it failed; the message names its log.
          SystemExit: it was stopped, with its exit code; the same command goes on.
        """
        folder = run.folder(self.root)
        if folder in self._done:
            return folder
        if run.after is not None:
            self.complete(run.after)
        command = run.command(self.root)
        record = _read(folder / _RECORD)
        if record.get("command") == command and record.get("complete"):
            self._say(f"{folder}: complete, reused")
        else:
            spent = record.get("seconds", 0.0) if record.get("command") == command else 0.0
            record = {"command": command, "seconds": spent, "complete": False}
            self._train(folder, record)
        self._done[folder] = record["seconds"]
        return folder

    def _train(self, folder: Path, record: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "reproduce.log"
        self._say(f"{folder}: {shlex.join(record['command'])}")
        start = time.perf_counter()
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(
                [sys.executable, *record["command"][1:]], stdout=file, stderr=file
            ).returncode
        record["seconds"] += time.perf_counter() - start
        record["complete"] = code == cli.DONE
        (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if code == cli.PREEMPTED:
            raise SystemExit(code)
        if code:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
            message = f"the run in {folder} ended with code {code} (log: {log}): " + " / ".join(
                lines
            )
            raise ConfigError(message) if code == cli.BAD_CONFIG else RuntimeError(message)
        self._say(f"{folder}: {record['seconds']:.0f} s")


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def load_experiment(file: str, argument: str = "") -> ExperimentConfig:
    """The settings that a config file gives for an argument."""
    if not Path(file).is_file():
        raise ConfigError(f"{file}: there is no such file; run this in the project's folder")
    return from_config_dict(runpy.run_path(file)["get_config"](argument))
