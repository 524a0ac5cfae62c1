"""Storage that fails under a run: what ends it, what does not, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cwcl_jax.cli import DONE, FAILED
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.workdir import only_user
from tests.preloading import CLOCK, FILES, compiled


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("faults"), FILES)


def train(workdir, library=None, options=(), jumps="", **faults):
    """A run of four steps, saved at the second, under faults; what it left and said."""
    environment = os.environ | {f"FAULT_{name}": str(value) for name, value in faults.items()}
    environment["CLOCK_JUMPS"] = jumps
    if library:
        environment["LD_PRELOAD"] = str(library)
    command = ["timeout", "-s", "KILL", "900", sys.executable, "-m", "cwcl_jax.train"]
    command += ["--config=tests/training/toy_file.py", f"--workdir={workdir}"]
    command += ["--config.logging.every_steps=1", "--config.checkpoint.every_steps=2"]
    command += ["--config.logging.tensorboard=True", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


QUICK = ["--config.evaluation.tasks={}"]


def steps(workdir):
    return [r["step"] for r in read_json_lines(workdir / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_goes_on_without_tensorboard(tmp_path, library):
    """Slow: a run under LD_PRELOAD; the suite has the one whose metrics cannot be written."""
    done = train(tmp_path, library, PATH="/tensorboard/", CALLS="write", ERRNO=5, AFTER=300)
    assert done.returncode == DONE, done.stderr
    assert done.stderr.count("warning: TensorBoard's file (the run continues without it)") == 2
    assert "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.multiprocess
def test_a_run_that_cannot_write_its_metrics_saves_and_ends(tmp_path, library):
    """And the next start, on a disk that is in order again, goes on from there."""
    faults = {"PATH": "/metrics.jsonl", "CALLS": "write", "ERRNO": 28, "AFTER": 1500}
    done = train(tmp_path, library, QUICK, **faults)
    assert done.returncode == FAILED, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last == f"error: [Errno 28] No space left on device: '{tmp_path / 'metrics.jsonl'}'"
    assert "Traceback" not in done.stderr
    before = steps(tmp_path)
    assert before in ([1, 2], [1], [1, 2, 3])
    again = train(tmp_path, options=QUICK)
    assert again.returncode == DONE, again.stderr
    assert f"resuming after step {before[-1] + 1}" in again.stdout
    assert steps(tmp_path) == [step for step in (1, 2, 3, 4) if step != before[-1] + 1]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "path",
    [
        "/params/",
        # Slow: the same answer for other files, each in a process of its own.
        pytest.param("_METADATA", marks=pytest.mark.slow),
        pytest.param("/checkpoints/4/_CHECKPOINT", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(whole, library, path):
    before = sorted(p for p in (whole / "checkpoints").rglob("*"))
    done = train(whole, library, PATH=path, CALLS="read", ERRNO=5)
    assert done.returncode == FAILED, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: [Errno 5] ")
    assert "damaged" not in done.stdout + done.stderr
    assert sorted(p for p in (whole / "checkpoints").rglob("*")) == before


@pytest.fixture
def read_only(tmp_path):
    """A folder with a file, on a file system that is mounted read-only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    calls = (["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder])
    if os.geteuid() or any(subprocess.run(call, check=False).returncode for call in calls):
        pytest.skip("mounting read-only is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_folder_that_nobody_can_write_needs_no_lock(read_only):
    """So that a complete run in it can be shown."""
    with only_user(read_only), pytest.raises(OSError, match="Read-only file system"):
        (read_only / "lock").touch()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is to be evaluated again."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(workdir).returncode == DONE
    (workdir / "results.txt").unlink()
    return workdir


def saved_at(checkpoint):
    """The time of day, in seconds, at which a save began, as orbax writes it down."""
    metadata = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())
    return metadata["init_timestamp_nsecs"] / 1e9


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_clock_that_jumps_changes_nothing(whole, tmp_path):
    """Slow: runs under LD_PRELOAD.

    By a day and an hour forward after the first step, and by as much back after the first save.

    All limits of time are far below that.
    """
    workdir = tmp_path / "run"
    jumps = f"{workdir}/metrics.jsonl=90000;{workdir}/checkpoints/2=-90000"
    done = train(workdir, compiled(tmp_path, CLOCK), jumps=jumps)
    assert done.returncode == DONE, done.stderr
    assert "Traceback" not in done.stderr
    assert "watchdog" not in done.stderr
    records, undisturbed = (
        [r for r in read_json_lines(folder / "metrics.jsonl") if "loss" in r]
        for folder in (workdir, whole)
    )
    assert [r["loss"] for r in records] == [r["loss"] for r in undisturbed]
    # What is told of time is time that passed.
    assert all(0 <= r["seconds_per_step"] < 300 for r in records if r["step"] > 1)
    begun = [saved_at(workdir / "checkpoints" / step) for step in ("2", "4")]
    assert begun[1] - begun[0] < -170_000  # the clock did jump
    assert (workdir / "results.json").read_text() == (whole / "results.json").read_text()
