"""The local launcher starts, ends and names its processes; here they are small shell scripts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import local

LOCAL = [sys.executable, str(Path(local.__file__))]
# Starts a command that heeds the terminal's end, also where the tests themselves run under nohup.
_HEED = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
HEEDING = [sys.executable, "-c", f"{_HEED}; os.execv(sys.argv[1], sys.argv[1:])"]


def launch(script, *options):
    return subprocess.run(
        [*LOCAL, *options, "--", "sh", "-c", script], capture_output=True, text=True, check=False
    )


def test_every_process_gets_its_place_and_its_lines_their_number():
    done = launch('echo "$CWCL_PROCESS_ID of $CWCL_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"')
    assert done.returncode == 0
    lines = sorted(done.stdout.splitlines())
    assert [line.split(" at ")[0] for line in lines] == ["[0] 0 of 2", "[1] 1 of 2"]
    assert len({line.split(" at ")[1] for line in lines}) == 1


def test_cpu_devices_and_threads():
    options = local.parse(["-n", "2", "-d", "3", "true"])
    env = local.environment(options, 1234, 1)
    assert "--xla_force_host_platform_device_count=3" in env["XLA_FLAGS"]
    assert (env["JAX_PLATFORMS"], env["PJRT_NPROC"]) == ("cpu", "32")
    assert env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_gpus_are_shared_out(monkeypatch):
    options = local.parse(["-n", "2", "-d", "2", "--gpus", "true"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    visible = [local.environment(options, 1, rank)["CUDA_VISIBLE_DEVICES"] for rank in range(2)]
    assert visible == ["0,1", "2,3"]
    # Without it jax takes one of the two in a shell of SLURM's, and without the other a CPU.
    env = local.environment(options, 1, 1)
    assert (env["JAX_LOCAL_DEVICE_IDS"], env["CWCL_LOCAL_PROCESSES"]) == ("0,1", "2")
    assert env["JAX_PLATFORMS"] == os.environ.get("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    visible = [local.environment(options, 1, rank)["CUDA_VISIBLE_DEVICES"] for rank in range(2)]
    assert visible == ["4,5", "6,7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(SystemExit, match="need 4, but CUDA_VISIBLE_DEVICES=4,5,6 names 3"):
        local.environment(options, 1, 0)


def test_one_process_for_each_gpu_unless_asked_otherwise(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert local.parse(["--gpus", "true"]).processes == 4
    assert local.parse(["--gpus", "-d", "2", "true"]).processes == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    files = ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"]
    monkeypatch.setattr(local.os, "listdir", lambda _: files)
    assert local.parse(["--gpus", "true"]).processes == 2
    files[:] = ["null"]
    with pytest.raises(SystemExit):
        local.parse(["--gpus", "true"])
    assert "no 1 GPUs here" in capsys.readouterr().err
    assert local.parse(["true"]).processes == 2


def test_several_hosts_are_one_job(monkeypatch):
    monkeypatch.setenv("CWCL_NUM_HOSTS", "3")
    monkeypatch.setenv("CWCL_HOST_ID", "2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:8476")
    env = local.environment(local.parse(["-n", "4", "true"]), 0, 1)
    assert (env["CWCL_PROCESS_ID"], env["CWCL_NUM_PROCESSES"]) == ("9", "12")
    assert env["JAX_COORDINATOR_ADDRESS"] == "first:8476"
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    with pytest.raises(SystemExit, match="wants CWCL_HOST_ID from 0 to 2 and JAX_COORD"):
        local.hosts()


def test_the_first_failure_ends_the_others_and_is_the_exit_code():
    start = time.monotonic()
    done = launch('[ "$CWCL_PROCESS_ID" = 1 ] && exit 3; sleep 300', "-n", "3")
    assert done.returncode == 3
    assert time.monotonic() - start < 200
    assert "[local] process 1: exit code 3" in done.stdout


def test_of_failures_between_two_looks_an_own_exit_code_comes_before_a_signal():
    """A process that fails has jax abort the others, which may be seen in the same look."""
    assert local.first_failed([None, 3]) == (1, 3)
    assert local.first_failed([-signal.SIGABRT, 0, 3]) == (2, 3)
    assert local.first_failed([-signal.SIGABRT, -signal.SIGKILL]) == (0, -signal.SIGABRT)


def test_a_failure_is_named_also_where_no_process_is_left():
    done = launch("exit 3", "-n", "1")
    assert done.returncode == 3
    assert done.stdout == "[local] process 0: exit code 3\n"


def test_a_signal_to_a_process_that_has_just_ended_is_no_error():
    job = local.Job(local.parse(["true"]))
    job._processes = [subprocess.Popen(["true"], start_new_session=True)]
    with job._processes[0]._waitpid_lock:  # held by the poll that the signal handler interrupts
        os.waitid(os.P_PID, job._processes[0].pid, os.WEXITED | os.WNOWAIT)
        os.waitpid(job._processes[0].pid, 0)
        job.terminate()
    job._processes[0].wait()


def test_the_port_is_nobody_elses_until_the_job_ends():
    with local.held_port() as holder, socket.socket() as other:
        port = holder.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with socket.socket(socket.AF_INET6) as coordinator:  # as gRPC's
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind(("::", port))
            coordinator.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=60):
                coordinator.accept()[0].close()


def test_a_killed_process_is_named():
    done = launch('[ "$CWCL_PROCESS_ID" = 0 ] && kill -9 $$; sleep 100')
    assert done.returncode == 128 + signal.SIGKILL
    assert "[local] process 0: SIGKILL" in done.stdout


def test_preempted_processes_are_not_hurried():
    done = launch('[ "$CWCL_PROCESS_ID" = 0 ] && exit 75; sleep 1; echo saved; exit 75')
    assert done.returncode == 75
    assert "[1] saved" in done.stdout


def test_a_command_that_does_not_exist_is_named():
    done = subprocess.run([*LOCAL, "--", "pyton"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "local.py: 'pyton' cannot be started: No such file or directory\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_the_terminals_end_is_passed_on_except_under_nohup(ignored, tmp_path):
    script = f"trap 'exit 75' TERM; echo here; while [ ! -e {tmp_path}/end ]; do sleep 0.1; done"
    child = subprocess.Popen(
        [*(["nohup"] if ignored else HEEDING), *LOCAL, "--grace", "300", "--", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(2):
        assert "here" in child.stdout.readline()
    child.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(1)  # in which it could be passed on
        (tmp_path / "end").touch()
    child.communicate(timeout=300)
    assert child.returncode == (0 if ignored else 75)


@pytest.mark.parametrize(
    ("trap", "grace", "code"),
    [("trap 'echo saving; exit 75' TERM", "300", 75), ("trap '' TERM", "1", 137)],
)
def test_term_is_passed_on_and_kill_follows(trap, grace, code):
    child = subprocess.Popen(
        [
            *LOCAL,
            "--grace",
            grace,
            "--",
            "sh",
            "-c",
            f"{trap}; echo here; while :; do sleep 0.1; done",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [child.stdout.readline() for _ in range(2)]
    assert sorted(lines) == ["[0] here\n", "[1] here\n"]
    child.terminate()
    output, _ = child.communicate(timeout=300)
    assert child.returncode == code
    assert output.count("saving") == (2 if code == 75 else 0)
