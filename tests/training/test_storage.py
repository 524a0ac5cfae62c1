"""Storage that fails under a run: what ends it, what does not, and what is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from cwcl_jax.cli import DONE, FAILED
from cwcl_jax.training.metrics import read_json_lines

# Fails calls on files whose path contains FAULT_PATH: those named in FAULT_CALLS, with FAULT_ERRNO,
# after the first FAULT_AFTER bytes or so were written (0: at once).
FAULTS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>
static long written = 0;
static int fails(int fd, const char *call, size_t count) {
  const char *path = getenv("FAULT_PATH"), *calls = getenv("FAULT_CALLS");
  char link[64], name[4096];
  if (!path || !calls || !strstr(calls, call)) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, name, sizeof name - 1);
  if (length < 0) return 0;
  name[length] = 0;
  if (!strstr(name, path)) return 0;
  const char *after = getenv("FAULT_AFTER");
  long start = written;
  written += count;
  if (after && start < atol(after)) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}
#define WRAP(result, call, name, arguments, ...) \
  result name arguments { \
    static result (*real) arguments = 0; \
    if (!real) real = dlsym(RTLD_NEXT, #name); \
    return fails(fd, call, count) ? -1 : real(__VA_ARGS__); \
  }
WRAP(ssize_t, "write", write, (int fd, const void *b, size_t count), fd, b, count)
WRAP(ssize_t, "write", pwrite, (int fd, const void *b, size_t count, off_t o), fd, b, count, o)
WRAP(ssize_t, "write", pwrite64, (int fd, const void *b, size_t count, off64_t o), fd, b, count, o)
WRAP(ssize_t, "read", read, (int fd, void *b, size_t count), fd, b, count)
WRAP(ssize_t, "read", pread, (int fd, void *b, size_t count, off_t o), fd, b, count, o)
WRAP(ssize_t, "read", pread64, (int fd, void *b, size_t count, off64_t o), fd, b, count, o)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.c").write_text(FAULTS)
    path = folder / "faults.so"
    command = [compiler, "-shared", "-fPIC", "-o", path, folder / "faults.c", "-ldl"]
    subprocess.run(command, check=True)
    return path


def train(workdir, library=None, options=(), **faults):
    """A run of four steps, saved at the second, under faults; what it left and said."""
    environment = os.environ | {f"FAULT_{name}": str(value) for name, value in faults.items()}
    if library:
        environment["LD_PRELOAD"] = str(library)
    command = ["timeout", "-s", "KILL", "300", sys.executable, "-m", "cwcl_jax.train"]
    command += ["--config=tests/training/toy_file.py", f"--workdir={workdir}"]
    command += ["--config.logging.every_steps=1", "--config.checkpoint.every_steps=2"]
    command += ["--config.logging.tensorboard=True", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


QUICK = ["--config.evaluation.tasks={}"]


def steps(workdir):
    return [r["step"] for r in read_json_lines(workdir / "metrics.jsonl") if "loss" in r]


@pytest.mark.multiprocess
def test_a_run_goes_on_without_tensorboard(tmp_path, library):
    done = train(tmp_path, library, PATH="/tensorboard/", CALLS="write", ERRNO=5, AFTER=300)
    assert done.returncode == DONE, done.stderr
    assert done.stderr.count("warning: TensorBoard's file (the run goes on without it)") == 2
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is to be evaluated again."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(workdir).returncode == DONE
    (workdir / "results.txt").unlink()
    return workdir
