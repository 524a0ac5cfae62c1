"""Kills a run at random, again and again, and looks at what it left: run by hand.

    python -m tests.drill_kills --count=30

Four kinds in turns: while training, while the end of a run is evaluated, while a complete run is
evaluated again with another task, while a run is exported. After each kill every file of results
must be whole or not there; after the last one the run is finished, and its losses, results and
export must be those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.weights.readers import open_weights

CONFIG = "--config=tests/training/toy_file.py"
STEPS = "--config.total_steps=30"
OTHER = "--config.evaluation.tasks.shape.source=scenes:test?task=colour&n=40"


def command(kind: str, workdir: Path) -> list[str]:
    """The command that is killed."""
    if kind == "export":
        return ["cwcl_jax.export", f"--source={workdir}", f"--output={workdir}/export"]
    again = [OTHER] if kind == "again" else []
    return ["cwcl_jax.train", CONFIG, STEPS, f"--workdir={workdir}", *again]


def run(arguments: list[str], seconds: float | None = None) -> tuple[float, int, str]:
    """Runs a command, killed after some seconds; how long it took, its code and what it said."""
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PJRT_NPROC": "32"},
    )
    try:
        output, _ = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        output, _ = child.communicate()
    return time.monotonic() - start, child.returncode, output


def check_whole(workdir: Path) -> None:
    """Raises for a file of results that is not whole."""
    for path in [*workdir.glob("*.json"), *workdir.glob("export/*.json")]:
        json.loads(path.read_text())
    for path in workdir.glob("items/*.npz"):
        with np.load(path) as arrays:
            _ = {name: arrays[name] for name in arrays}
    for path in workdir.glob("export/*.safetensors"):
        weights = open_weights(path)
        _ = [weights.read(name) for name in weights.entries]
    for path in [*workdir.glob("results.*"), *workdir.glob("*.csv")]:
        assert path.read_text().endswith("\n"), path


def left(workdir: Path) -> dict[str, object]:
    """What must not depend on kills."""
    records = read_json_lines(workdir / "metrics.jsonl")
    return {
        "losses": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "evaluations": [r["step"] for r in records if any(n.startswith("eval") for n in r)],
        "results": (workdir / "results.json").read_text(),
        "export": sorted(
            (path.name, path.read_bytes()) for path in workdir.glob("export/*.safetensors")
        ),
    }


def drill(folder: Path, count: int, seed: int) -> None:
    """Prints a line for each kill; raises for the first thing that is not right."""
    reference, killed = folder / "reference", folder / "killed"
    seconds = {}
    for kind in ("train", "again", "export"):
        seconds[kind], code, output = run(command(kind, reference))
        assert code == 0, output
    shutil.copytree(reference, folder / "complete")
    rng = random.Random(seed)
    for number in range(count):
        kind = ("train", "train", "again", "export")[number % 4]
        workdir = killed
        if kind != "train":  # of a complete run
            workdir = folder / f"{kind}-{number}"
            shutil.copytree(folder / "complete", workdir)
            (workdir / "evaluated.json").unlink()
            shutil.rmtree(workdir / "export")
        # Most of a start is imports and compilation: the later half is where files are written.
        _, code, _ = run(command(kind, workdir), rng.uniform(0.4, 1.0) * seconds[kind])
        check_whole(workdir)
        print(f"{number} {kind}: {'killed' if code == -signal.SIGKILL else code}", flush=True)
        if kind != "train":
            for then in ("again", "export"):
                _, code, output = run(command(then, workdir))
                assert code == 0, output
            assert left(workdir) == left(reference), workdir
    for kind in ("train", "again", "export"):
        _, code, output = run(command(kind, killed))
        assert code == 0, output
    assert left(killed) == left(reference)
    print(f"{count} kills: all files whole, losses, results and export as without them")


def main() -> None:
    """Runs the drill in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drill(Path(folder), arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
