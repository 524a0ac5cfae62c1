"""Kills a run at random, again and again, and looks at what it left: run by hand.

    python -m tests.drill_kills --count=30

Four kinds in turns: while training (twice), while a complete run is evaluated again with another
task, while a run is exported; training ends with an evaluation. Commands that end before they are
killed do not count. After each kill every file of results must be whole or not there. The next kill
of that kind hits the same run, until one comes too late; then losses, results and export must be
those of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
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


def run(arguments: list[str], seconds: float = math.inf) -> tuple[float, int, str]:
    """Runs a command, killed when it used so much time of the processor, however busy that is.

    Returns:
      The seconds that it used, its exit code, what it said.
    """
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PJRT_NPROC": "32"},
        )
        used, status = 0.0, None
        while status is None:
            time.sleep(0.02)
            used = max(used, processor_seconds(child.pid))
            if used >= seconds:
                child.send_signal(signal.SIGKILL)
                child.wait()
            status = child.poll()
        said.seek(0)
        return used, status, said.read()


def processor_seconds(process: int) -> float:
    """What a process has used so far; 0 where it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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


def finish(workdir: Path, reference: dict[str, object], *kinds: str) -> None:
    """Runs the commands to their ends and compares what they left."""
    for kind in kinds:
        _, code, output = run(command(kind, workdir))
        assert code == 0, output
        assert "Traceback" not in output, output
    assert left(workdir) == reference, workdir


def begun(kind: str, folder: Path, turn: int) -> Path:
    """The folder of a run that is to be killed: empty, or a complete run's without results."""
    workdir = folder / f"{kind}-{turn}"
    if kind != "train":
        shutil.copytree(folder / "reference", workdir)
        (workdir / "evaluated.json").unlink()
        shutil.rmtree(workdir / "export")
    return workdir


def drill(folder: Path, count: int, seed: int) -> None:
    """Prints a line for each kill; raises for the first thing that is not right."""
    seconds = {}
    for kind in ("train", "again", "export"):
        seconds[kind], code, output = run(command(kind, folder / "reference"))
        assert code == 0, output
    print(", ".join(f"{kind} takes {used:.1f} s" for kind, used in seconds.items()), flush=True)
    reference = left(folder / "reference")
    rng, killed, under_way = random.Random(seed), Counter[str](), dict[str, Path]()
    for turn in itertools.count():
        kind = ("train", "train", "again", "export")[turn % 4]
        if kind not in under_way:
            under_way[kind] = begun(kind, folder, turn)
        workdir = under_way[kind]
        # Most of a start is imports and compilation: the later part is where files are written.
        _, code, _ = run(command(kind, workdir), rng.uniform(0.4, 1.0) * seconds[kind])
        check_whole(workdir)
        hit = code == -signal.SIGKILL
        killed.update([kind] * hit)
        print(f"{turn} {kind}: {'killed' if hit else code}", flush=True)
        over = list(under_way) if killed.total() == count else [] if hit else [kind]
        for name in over:
            workdir = under_way.pop(name)
            finish(workdir, reference, *(["train"] * (name == "train")), "again", "export")
            shutil.rmtree(workdir)
        if killed.total() == count:
            break
    told = ", ".join(f"{kind} {number}" for kind, number in killed.items())
    print(f"{count} kills ({told}): all files whole, losses, results and export as without them")


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
