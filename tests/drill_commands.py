"""Runs the documented commands as they are written, in order, in a fresh folder, by hand.

    python -m tests.drill_commands --folder=/tmp/tried --only='compare_torch|speech_cwcl' \
        --append=--config.total_steps=20

Commands come from the READMEs (see `test_readme.commands`). The folder gets a link to `configs/`
and `launch/` and a few files that the commands name; `python` is the interpreter at hand. A line is
printed for each command (exit code, seconds) and kept in `commands.json` there; what stands in it
with exit code 0 is not run again. `--append` adds an option to every training command, and is
recorded with it. What cannot run on any machine is in `EXEMPT`, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import time
import wave
from pathlib import Path

import numpy as np
from PIL import Image

from tests.test_readme import ROOT, block_with, commands

# Pattern -> why it is not run as it stands.
EXEMPT = {
    r"FILE|NAME|SOURCE FOLDER|=DIR|\.\.\.|/mnt/|configs/X\.py|=FOLDER": "a word of the user's",
    r"--gpus|gcloud|kubectl|pod\.sh": "GPUs, TPUs or a cluster",
    r"^sbatch": "SLURM: tests/launch/test_slurm.py",
    r"pip install": "makes an environment: run by .ci/run",
    r":paper|--scale=paper|m cwcl_jax\.check --config": "data and weights of the paper",
    r"/data\b|runs/[ABS]\b|tasks\.json|--embeds": "files of the user's",
    r"--mesh=": "the extra `plan`",
    r"cwcl_jax/assets": "writes into the package",
}


def exempt(command: str) -> str:
    """Why a command is not run; "" if it is."""
    return next((why for pattern, why in EXEMPT.items() if re.search(pattern, command)), "")


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
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "a.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(rng.integers(-3000, 3000, 32000, np.int16).tobytes())


def run(command: str, folder: Path, timeout: float) -> tuple[int, float, str]:
    """Exit code, seconds and the last line of a command; code 124 for one that takes too long."""
    words = re.sub(r"^python3?\b", shlex.quote(sys.executable), command)
    words = re.sub(r"-- python\b", f"-- {shlex.quote(sys.executable)}", words)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    start = time.perf_counter()
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
        return 124, timeout, ""
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, time.perf_counter() - start, lines[-1][:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, required=True)
    add("--only", default="", help="a regular expression of commands")
    add("--append", default="", help="options that every training command gets")
    add("--timeout", type=float, default=7200.0, help="seconds of a command")
    add("--list", action="store_true", help="only says what would be run, and what not")
    options = parser.parse_args()
    prepare(options.folder)
    record = options.folder / "commands.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    failed = 0
    for command in commands():
        reason = exempt(command)
        if reason or not re.search(options.only, command):
            if options.list and not options.only:
                print(f"not run ({reason}): {command}")
            continue
        if "cwcl_jax.train" in command and options.append:
            command += " " + options.append
        if options.list or known.get(command, {}).get("code") == 0:
            print(f"{'would run' if options.list else 'done before'}: {command}")
            continue
        code, seconds, last = run(command, options.folder, options.timeout)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        known[command] = {"code": code, "seconds": round(seconds), "at": now, "last": last}
        record.write_text(json.dumps(known, indent=1))
        print(f"exit {code}  {seconds:.0f} s  {command}\n    {last}", flush=True)
        failed += code != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
