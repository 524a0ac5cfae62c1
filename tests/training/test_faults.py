"""Every fault ends the whole job with a telling exit code, and the next start goes on from it.

The losses of the steps after the restart are those of an undisturbed job, bit for bit. `pytest -m
slow -s tests/training/test_faults.py` runs all faults and prints the table of tests/README.md; one,
kill -9, runs with every test: each fault starts two to six processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from cwcl_jax.cli import DONE, FAILED, PREEMPTED, WATCHDOG
from tests.training.jobs import (
    Job,
    example_ids,
    forget_ids,
    losses,
    run_job,
    saved_steps,
    write_experiment,
)
from tests.training.toy import toy_config

STEPS = 6
SETTINGS = {
    "total_steps": STEPS,
    "checkpoint.asynchronous": False,  # a save that was begun before a fault is then complete
    "evaluation.every_steps": 4,
}
CONFIG = toy_config(**SETTINGS)
# Low enough to wait for in a test, too low for a busy machine without such a fault.
IMPATIENT = toy_config(**SETTINGS | {"distributed.step_timeout": 5.0})
ATTENTIVE = toy_config(**SETTINGS | {"distributed.heartbeat_timeout": 10})

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses and example numbers of a job of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_experiment(folder, CONFIG)
    ending = run_job(folder / "run", 2)
    assert ending.codes == [DONE, DONE], ending.output
    return losses(folder / "run"), example_ids(folder / "run")


def report(name, ending, first_step):
    codes = ", ".join("frozen" if code is None else str(code) for code in ending.codes)
    print(f"\n| {name} | {codes} | {ending.seconds:.1f} | {first_step} |")


def resumes(workdir, undisturbed, after_step, processes=2, devices=1):
    """A second start goes on after `after_step` and ends as the undisturbed job did."""
    forget_ids(workdir)
    ending = run_job(workdir, processes, devices)
    assert set(ending.codes) == {DONE}, ending.output
    assert f"resuming after step {after_step}\n" in ending.output
    expected_losses, expected_ids = undisturbed
    ids = example_ids(workdir)
    assert sorted(ids) == list(range(after_step + 1, STEPS + 1))
    assert ids == {step: expected_ids[step] for step in ids}
    if (processes, devices) == (2, 1):
        assert losses(workdir) == expected_losses
    else:
        steps = sorted(expected_losses)
        found = losses(workdir)
        np.testing.assert_allclose(
            [found[s] for s in steps], [expected_losses[s] for s in steps], rtol=1e-5
        )


def faulty_job(tmp_path, fault, config=CONFIG, **options):
    write_experiment(tmp_path, config)
    return run_job(tmp_path / "run", 2, fault=fault, **options)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_the_next_start_goes_on(tmp_path, undisturbed):
    """Slow: three jobs of two processes; drill_kills kills runs anywhere."""
    ending = faulty_job(tmp_path, {"action": "kill", "process": 1, "step": 4})
    report("kill -9 of process 1", ending, 2)
    assert ending.codes[1] == -signal.SIGKILL
    assert ending.codes[0] not in (DONE, PREEMPTED)
    resumes(tmp_path / "run", undisturbed, 2)


@pytest.mark.slow
def test_a_hanging_process_is_ended_by_the_watchdog(tmp_path):
    """Slow: two processes; test_watchdog.py tells that what stands still is ended."""
    fault = {"action": "hang", "process": 1, "step": 4, "late": 2, "linger": 2}
    ending = faulty_job(tmp_path, fault, IMPATIENT)
    report("process 1 hangs (limit 5 s)", ending, 2)
    # Neither ends before the other one has written down its stacks, nor aborts it by its end.
    assert ending.codes == [WATCHDOG, WATCHDOG], ending.output
    for process in (0, 1):
        text = (tmp_path / f"run-{process}.txt").read_text()
        assert "watchdog: no progress for" in text
    assert " in act\n" in text  # the function in which process 1 hangs
    assert saved_steps(tmp_path / "run", CONFIG) == [2]


@pytest.mark.slow
def test_an_exception_on_one_process_is_told_and_ends_the_job(tmp_path):
    """Slow: two processes."""
    ending = faulty_job(tmp_path, {"action": "raise", "process": 1, "step": 4})
    report("exception on process 1", ending, 2)
    assert ending.codes[1] == FAILED
    assert ending.codes[0] not in (DONE, PREEMPTED)
    # On the terminal, and in the file of the process.
    terminal = (tmp_path / "run-1.txt").read_text()
    log = (tmp_path / "run" / "logs" / "process-1.log").read_text()
    for text in (terminal, log):
        assert "[process 1 of 2] RuntimeError: no such luck" in text


PACE = {"action": "term", "process": 1, "pace": 0.3}


def preempted(tmp_path, fault, config):
    """A job of which one process gets SIGTERM; the step that all saved."""
    ending = faulty_job(tmp_path, fault, config)
    assert ending.codes == [PREEMPTED, PREEMPTED], ending.output
    step = saved_steps(tmp_path / "run", config)[-1]
    assert f"stopped after step {step}, saved" in ending.output
    return ending, step


@pytest.mark.slow
def test_sigterm_to_one_stops_all_and_another_layout_goes_on(tmp_path, undisturbed):
    """Slow: three processes, a second a step."""
    config = toy_config(**SETTINGS | {"checkpoint.every_steps": 0})
    # Slow: the processes must agree on a step before the last one, however starved they are.
    ending, step = preempted(tmp_path, PACE | {"step": 1, "pace": 1.0}, config)
    report("SIGTERM to process 1 before its first compilation", ending, step)
    assert 1 <= step < STEPS
    resumes(tmp_path / "run", undisturbed, step, processes=1, devices=4)


@pytest.mark.slow
def test_sigterm_in_an_evaluation(tmp_path, undisturbed):
    config = toy_config(**SETTINGS | {"checkpoint.every_steps": 0, "evaluation.batch_size": 4})
    fault = {"action": "term", "process": 1, "place": "evaluation"}
    ending, step = preempted(tmp_path, fault, config)
    report("SIGTERM to process 1 in the evaluation after step 4", ending, step)
    assert step == 4
    resumes(tmp_path / "run", undisturbed, 4)
    # Made up for by the second start.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.count('{"step": 4, "evaluation/') == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "action", "process"),
    [
        ("kill -9 of process 0", "kill", 0),
        ("kill -9 of process 1", "kill", 1),
        ("SIGSTOP of process 0 (heartbeat 10 s)", "stop", 0),
        ("SIGSTOP of process 1 (heartbeat 10 s)", "stop", 1),
        ("exception on process 0", "raise", 0),
        ("exception on process 1", "raise", 1),
        ("process 0 hangs (limit 5 s)", "hang", 0),
        ("process 1 hangs (limit 5 s)", "hang", 1),
    ],
)
def test_fault_in_a_step(tmp_path, undisturbed, name, action, process):
    frozen = [process] if action == "stop" else []
    fault = {"action": action, "process": process, "step": 4}
    config = {"hang": IMPATIENT, "stop": ATTENTIVE}.get(action, CONFIG)
    ending = faulty_job(tmp_path, fault, config, frozen=frozen)
    report(name, ending, 2)
    assert not {DONE, PREEMPTED} & set(ending.codes), ending.output
    write_experiment(tmp_path, CONFIG)
    resumes(tmp_path / "run", undisturbed, 2)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_sigterm_to_one_of_two(tmp_path, undisturbed, step):
    config = toy_config(**SETTINGS | {"checkpoint.every_steps": 0})
    ending, saved = preempted(tmp_path, PACE | {"step": step}, config)
    report(f"SIGTERM to process 1 in step {step} (0.3 s a step)", ending, saved)
    resumes(tmp_path / "run", undisturbed, saved)


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_kill_in_an_asynchronous_save(tmp_path, undisturbed, process):
    config = toy_config(**SETTINGS | {"checkpoint.asynchronous": True})
    fault = {"action": "kill", "process": process, "place": "save", "step": 4}
    ending = faulty_job(tmp_path, fault, config)
    saved = saved_steps(tmp_path / "run", config)[-1]
    begun = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    report(f"kill -9 of process {process} in an asynchronous save ({begun})", ending, saved)
    assert ending.codes[process] == -signal.SIGKILL
    assert saved in (2, 4)  # 4 where the files were written before the process was gone
    resumes(tmp_path / "run", undisturbed, saved)


@pytest.mark.slow
def test_four_processes_lose_one(tmp_path, undisturbed):
    write_experiment(tmp_path, CONFIG)
    ending = run_job(tmp_path / "run", 4, fault={"action": "kill", "process": 2, "step": 4})
    report("kill -9 of process 2 of 4", ending, 2)
    assert not {DONE, PREEMPTED} & set(ending.codes), ending.output
    resumes(tmp_path / "run", undisturbed, 2, processes=4)


def is_root():
    return os.geteuid() == 0


@pytest.fixture
def small_disk(tmp_path):
    if not is_root():
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], check=False
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_full_disk(small_disk, undisturbed):
    write_experiment(small_disk, CONFIG)
    workdir = small_disk / "run"
    # Room for the first checkpoint and not for the second.
    job = Job(workdir, 2, fault={"pace": 0.5})
    job.wait_for(lambda: (workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA").exists())
    free = shutil.disk_usage(small_disk).free
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(b"\0" * max(free - 65536, 0))
    ending = job.end()
    filler.unlink()
    report("disk full at the save of step 4 (since the start)", ending, 2)
    assert not {DONE, PREEMPTED} & set(ending.codes), ending.output
    assert saved_steps(workdir, CONFIG) == [2]
    resumes(workdir, undisturbed, 2)


@pytest.fixture
def two_hosts():
    """Prefixes of commands that run in two network namespaces, and how to cut the second off."""
    if not is_root() or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need root, ip and nsenter")
    setup = Path(__file__).parent / "two_hosts.sh"
    if subprocess.run(["bash", str(setup), "up"], check=False).returncode:
        pytest.skip("network namespaces cannot be made here")
    yield [["bash", str(setup), "run", str(i)] for i in range(2)]
    subprocess.run(["bash", str(setup), "down"], check=True)


@pytest.mark.slow
def test_lost_link_between_two_hosts(tmp_path, undisturbed, two_hosts):
    write_experiment(tmp_path, ATTENTIVE)
    workdir = tmp_path / "run"
    environ = {"JAX_COORDINATOR_ADDRESS": "10.77.9.10:8476", "CWCL_NUM_HOSTS": "2"}
    job = Job(workdir, 2, fault={"pace": 0.5}, prefixes=two_hosts, environ=environ)
    job.wait_for(lambda: 3 in losses(workdir))
    subprocess.run(["ip", "link", "set", "cwclv1", "down"], check=True)
    (workdir / "deed.txt").write_text(repr(time.time()))
    ending = job.end()
    report("link between two network namespaces cut (heartbeat 10 s)", ending, 2)
    assert not {DONE, PREEMPTED} & set(ending.codes), ending.output
    resumes(workdir, undisturbed, 2)
