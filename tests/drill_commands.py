"""Runs the documented commands as they are written, in a fresh folder.

    python -m tests.drill_commands --folder=/tmp/tried --only='compare_torch|speech_cwcl' \
        --append=--config.total_steps=20

Commands come from the READMEs (see `test_readme.commands`). The folder gets a link to `configs/`
and `launch/` and a few files that the commands name; `python` is the interpreter at hand. A command
that names a run which another one makes comes after it. A line is printed for each command (exit
code, seconds, processor seconds) and kept in `commands.json` there; what stands in it with exit
code 0 is not run again. `--append` adds an option to every training command, and is recorded with
it. `EXEMPT` says what cannot run on any machine, and why. `QUICK` are the commands that
tests/test_commands.py runs in the suite; `--quick` runs these alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.test_readme import ROOT, block_with, commands

# Pattern -> why it is not run as it stands.
EXEMPT = {
    r"FILE|NAME|SOURCE FOLDER|=DIR|\.\.\.|/mnt/|configs/X\.py|=FOLDER": "a word of the user's",
    r"--gpus|gcloud|kubectl|pod\.sh": "GPUs, TPUs or a cluster",
    r"^sbatch": "SLURM: tests/launch/test_slurm.py",
    r"pip install": "makes an environment: run by .ci/run",
    r"(train|check) .*:paper": "data and weights of the paper",
    r"=/data\b": "sentences or recordings of the user's",
    r"cwcl_jax/assets": "writes into the package",
}
# Pattern -> documented options that make a long command short, appended by `--short`.
SHORTER = {
    r"cwcl_jax\.train --config=configs/": "--config.total_steps=20",
    r"benchmarks\.heads": "--seeds=1 --steps=50",
    r"reproduce --(table|ablation)=": "--seeds=1 --steps=10",
}
# What runs in the suite: a few processor seconds each. (mine.py's trainings take 19, a comparison
# with PyTorch more than 70.)
QUICK = re.compile(r"^python eeg\.py$|reproduce --scale=paper")


class Done(NamedTuple):
    """A command that has ended; code 124 for one that took too long."""

    code: int
    seconds: float
    cpu_seconds: float
    last_line: str


def exempt(command: str) -> str:
    """Why a command is not run; "" if it is."""
    return next((why for pattern, why in EXEMPT.items() if re.search(pattern, command)), "")


def with_options(command: str, short: bool, append: str) -> str:
    """The command with the options that make it short, if asked for, and those of one's own."""
    more = [
        options for pattern, options in SHORTER.items() if short and re.search(pattern, command)
    ]
    if append and "cwcl_jax.train" in command:
        more.append(append)
    return " ".join([command, *more])


def run_folders(command: str) -> tuple[set[str], set[str]]:
    """The folders of runs that a command reads, and those that it makes."""
    named = set(re.findall(r"runs/[\w.-]+", command))
    if "cwcl_jax.train" not in command:
        return named, set()
    words = {word.partition("=")[0]: word.partition("=")[2] for word in shlex.split(command)}
    path, _, argument = words.get("--config", "").partition(":")
    usual = "-".join(re.split(r"[=,/]+", f"runs/{Path(path).stem},{argument}".rstrip(","))[1:])
    made = {words.get("--workdir", f"runs/{usual}")}
    return named - made, made


def in_order(found: list[str]) -> list[str]:
    """The commands in their order, each after those that make the runs it reads."""
    made_by_some = set().union(*(run_folders(command)[1] for command in found))
    left, made, result = list(found), set(), []
    while left:
        able = (c for c in left if not (run_folders(c)[0] & made_by_some) - made)
        command = next(able, left[0])
        left.remove(command)
        result.append(command)
        made |= run_folders(command)[1]
    return result


def prepare(folder: Path) -> None:
    """Makes the folder, with what the documentation takes for granted."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "launch"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    if not (folder / "eeg.py").exists():  # copied, as its page says
        (folder / "eeg.py").write_bytes((ROOT / "configs/eeg.py").read_bytes())
    (folder / "mine.py").write_text(block_with("def get_config").partition("python -m")[0])
    table = block_with('to_parquet("pairs.parquet")')
    subprocess.run([sys.executable, "-c", table], cwd=folder, check=True)
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((4096, 32)).astype(np.float32) for name in ("a", "b")}
    np.savez(folder / "features.npz", profile=rows["a"], compound=rows["a"] + rows["b"])
    u, v = (x[:64] / np.linalg.norm(x[:64], axis=1, keepdims=True) for x in rows.values())
    np.savez(folder / "dumped.npz", u=u, v=v)
    task = {"kind": "retrieval", "source": "scenes:test?task=retrieval&n=200"}
    (folder / "tasks.json").write_text(json.dumps({"few": task}))
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "a.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(rng.integers(-3000, 3000, 32000, np.int16).tobytes())


def run(command: str, folder: Path, timeout: float) -> Done:
    """Runs a command in a shell and returns how it ended."""
    words = re.sub(r"^python3?\b", shlex.quote(sys.executable), command)
    words = re.sub(r"-- python\b", f"-- {shlex.quote(sys.executable)}", words)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            words,
            shell=True,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Done(124, timeout, 0.0, "")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return Done(done.returncode, time.perf_counter() - start, cpu, lines[-1][:160])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--only", default="", help="a regular expression of commands")
    add("--quick", action="store_true", help="only the commands that the suite runs too")
    add("--short", action="store_true", help="with the options of SHORTER")
    add("--append", default="", help="options that every training command gets")
    add("--timeout", type=float, default=7200.0, help="seconds of a command")
    add("--list", action="store_true", help="only says what would be run, and what not")
    options = parser.parse_args()
    if not options.list:
        prepare(options.folder)
    record = options.folder / "commands.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    failed = 0
    for command in filter(exempt, commands() if options.list else ()):
        print(f"not run ({exempt(command)}): {command}")
    pattern = QUICK if options.quick else re.compile(options.only)
    for command in in_order([command for command in commands() if not exempt(command)]):
        if not pattern.search(command):
            continue
        command = with_options(command, options.short, options.append)
        if options.list or known.get(command, {}).get("code") == 0:
            print(f"{'would run' if options.list else 'done before'}: {command}")
            continue
        done = run(command, options.folder, options.timeout)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        known[command] = done._asdict() | {"at": now}
        record.write_text(json.dumps(known, indent=1))
        print(f"exit {done.code}  {done.seconds:.0f} s, {done.cpu_seconds:.0f} s of processors  ")
        print(f"{command}\n    {done.last_line}", flush=True)
        failed += done.code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
