"""Starts jobs of several processes of a toy run, with or without a fault; tells how they end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cwcl_jax.config import ExperimentConfig, to_json
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.metrics import read_json_lines
from launch import local
from tests import xla_flags

ROOT = Path(__file__).parent.parent.parent
CHILD = [sys.executable, "-m", "tests.training.faulty_child"]
# No process of a test outlives this; ten seconds are usual, a starved machine needs most of it.
_LONGEST = 900.0


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a job ended.

    Attributes:
      codes: exit code of each process; negative for a signal, None for one that had to be killed.
      seconds: from the deed (or the start, without one) until the last process was gone, those
        that had to be killed left out.
      output: what all processes wrote, their log files included.
    """

    codes: list[int | None]
    seconds: float
    output: str


class Job:
    """The processes of one start."""

    def __init__(
        self,
        workdir: Path,
        processes: int,
        devices: int = 1,
        fault: Mapping[str, Any] | None = None,
        prefixes: Sequence[Sequence[str]] | None = None,
        environ: Mapping[str, str] | None = None,
    ):
        options = local.parse(["-n", str(processes), "-d", str(devices), "--", "true"])
        self.workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "deed.txt").unlink(missing_ok=True)
        self._start = time.time()
        self._holder = local.held_port()
        port = self._holder.getsockname()[1]
        self.outputs = [workdir.parent / f"{workdir.name}-{r}.txt" for r in range(processes)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            env = local.environment(options, port, rank)
            env["XLA_FLAGS"] = xla_flags.with_devices(devices)
            env |= {"PYTHONPATH": str(ROOT), "FAULT": json.dumps(fault or {}), **(environ or {})}
            prefix = prefixes[rank] if prefixes else ()
            with output.open("a") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*prefix, *CHILD, str(workdir)],
                        env=env,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds, for as long as the job is there."""
        deadline = time.monotonic() + _LONGEST
        while not condition():
            assert time.monotonic() < deadline, self.text()
            assert any(p.poll() is None for p in self.processes), self.text()
            time.sleep(0.05)

    def end(self, frozen: Sequence[int] = ()) -> Ending:
        """Waits for all processes but the `frozen` ones, which are killed then."""
        deadline = time.monotonic() + _LONGEST
        waited = [p for rank, p in enumerate(self.processes) if rank not in frozen]
        try:
            while any(p.poll() is None for p in waited):
                assert time.monotonic() < deadline, self.text()
                time.sleep(0.02)
            ended = time.time()
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self._holder.close()
        codes = [None if r in frozen else p.returncode for r, p in enumerate(self.processes)]
        deed = self.workdir / "deed.txt"
        since = float(deed.read_text()) if deed.exists() else self._start
        return Ending(codes, ended - since, self.text())

    def text(self) -> str:
        """What all processes wrote."""
        files = [*self.outputs, *sorted((self.workdir / "logs").glob("*.log"))]
        return "\n".join(
            f"=== {file.name}\n{file.read_text(errors='replace')}"
            for file in files
            if file.exists()
        )


def run_job(workdir: Path, processes: int, devices: int = 1, **options: Any) -> Ending:
    """A job from start to end."""
    frozen = options.pop("frozen", ())
    return Job(workdir, processes, devices, **options).end(frozen)


def write_experiment(folder: Path, config: ExperimentConfig) -> None:
    """Where the processes of jobs in `folder`/NAME read their settings."""
    (folder / "experiment.json").write_text(to_json(config))


def losses(workdir: Path) -> dict[int, float]:
    """By step."""
    records = read_json_lines(workdir / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def example_ids(workdir: Path, processes: Sequence[int] = range(8)) -> dict[int, list[int]]:
    """By step, the numbers of the global batch; of a step done twice the last ones."""
    result: dict[int, dict[int, list[int]]] = {}
    for process in processes:
        for record in read_json_lines(workdir / f"ids-{process}.jsonl"):
            result.setdefault(record["step"], {})[process] = record["ids"]
    return {
        step: [i for process in sorted(parts) for i in parts[process]]
        for step, parts in result.items()
    }


def forget_ids(workdir: Path) -> None:
    """Before a start whose example numbers alone are wanted."""
    for file in workdir.glob("ids-*.jsonl"):
        file.unlink()


def saved_steps(workdir: Path, config: ExperimentConfig) -> list[int]:
    """Steps of the complete checkpoints."""
    folder = workdir / "checkpoints"
    with Checkpoints(folder, config.checkpoint, read_only=True) as checkpoints:
        return checkpoints.steps
