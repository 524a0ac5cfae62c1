"""Files are whole or not there; locks hold, also where the file system has none."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from cwcl_jax import files
from tests.preloading import CLOCK, NO_FLOCK, compiled

HOLDER = """
import sys
from pathlib import Path
from cwcl_jax import files
files._POLL, files._RENEW, files._STALE = 0.05, 0.2, 1.5
waited = []
def waiting():
    if not waited:
        print("waits", flush=True)
    waited.append(1)
try:
    with files.locked(Path(sys.argv[1]), waiting=waiting if len(sys.argv) > 2 else None):
        print("holds", flush=True)
        sys.stdin.readline()
except files.InUse as error:
    print("in use by", error, flush=True)
"""


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old", "new"):
        with files.replacing(path) as partial:
            assert not path.exists() or path.read_text() == "old"
            partial.write_text(text)

    def fail():
        with files.replacing(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(params=["flock", "no flock"])
def environment(request, tmp_path):
    """Of processes on a file system with and without locks."""
    environ = dict(os.environ)
    if request.param == "no flock":
        environ["LD_PRELOAD"] = str(compiled(tmp_path, NO_FLOCK))
    if request.param == "clock":
        environ["LD_PRELOAD"] = str(compiled(tmp_path, NO_FLOCK + CLOCK))
        environ["CLOCK_JUMPS"] = f"{tmp_path}/forward=90000;{tmp_path}/back=-90000"
    return environ


@pytest.fixture
def start(environment, tmp_path):
    """Starts processes that take the lock, say so, and hold it until their input ends."""
    with ExitStack() as stack:

        @contextmanager
        def started(*arguments):
            child = subprocess.Popen(
                ["timeout", "-s", "KILL", "60", sys.executable, "-c", HOLDER, tmp_path / "lock",
                 *arguments],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
            with child:
                yield child

        yield lambda *arguments: stack.enter_context(started(*arguments))


def test_a_lock_keeps_others_out_and_names_its_holder(start):
    first = start()
    assert first.stdout.readline() == "holds\n"
    assert start().stdout.readline().startswith("in use by process ")
    waits = start("wait")
    assert waits.stdout.readline() == "waits\n"
    first.communicate("\n")
    assert waits.stdout.readline() == "holds\n"
    waits.communicate("\n")


def test_the_lock_of_a_process_that_died_is_free(start):
    first = start()
    assert first.stdout.readline() == "holds\n"
    os.killpg(first.pid, 9)
    first.wait()
    assert start().stdout.readline().startswith("holds")


@pytest.mark.parametrize("environment", ["clock"], indirect=True)
def test_a_clock_that_jumps_frees_no_lock(start, tmp_path):
    """And holds none: what a dead process left is taken over in the time that passes."""
    first = start()
    assert first.stdout.readline() == "holds\n"
    for jump in ("forward", "back"):
        (tmp_path / jump).touch()
        assert start().stdout.readline().startswith("in use by process ")
    os.killpg(first.pid, 9)
    first.wait()
    assert start().stdout.readline().startswith("holds")


@pytest.mark.parametrize("environment", ["no flock"], indirect=True)
def test_a_folder_of_a_run_without_flock_has_one_user(environment, tmp_path):
    """What used to be skipped without a word."""
    code = """
import sys
from pathlib import Path
from cwcl_jax import files
from cwcl_jax.training.workdir import only_user
files._POLL, files._RENEW, files._STALE = 0.05, 0.2, 1.5
with only_user(Path(sys.argv[1])):
    second = only_user(Path(sys.argv[1]))
    try:
        second.__enter__()
    except ValueError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "another run is using" in done.stdout, done.stderr
    assert "(process " in done.stdout
