"""How processes find each other, agree and stop."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cwcl_jax.cli import BAD_CONFIG, DONE, FAILED, exit_code
from cwcl_jax.config import ConfigError, to_json
from cwcl_jax.training import distributed
from cwcl_jax.training.distributed import Layout, check_addresses, find_layout
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.options import DistributedConfig
from tests.training.toy import toy_config

ROOT = Path(__file__).parent.parent.parent
NONE = DistributedConfig()


def test_alone_without_settings_or_variables():
    assert find_layout(NONE, {}) is None
    assert find_layout(NONE, {"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}) is None
    assert find_layout(DistributedConfig(num_processes=1), {}) is None


def test_settings_come_before_variables():
    config = DistributedConfig(coordinator_address="a:1", num_processes=2, process_id=1)
    environ = {"CWCL_NUM_PROCESSES": "4", "CWCL_PROCESS_ID": "0"}
    assert find_layout(config, environ) == Layout("a:1", 2, 1, None, "config.distributed")


def test_own_variables_come_before_slurm():
    environ = {
        "JAX_COORDINATOR_ADDRESS": "node7:8476",
        "CWCL_NUM_PROCESSES": "4",
        "CWCL_PROCESS_ID": "3",
        "JAX_LOCAL_DEVICE_IDS": "0,1",
        "SLURM_STEP_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
    }
    layout = find_layout(NONE, environ)
    assert layout is not None
    assert (layout.coordinator, layout.num_processes, layout.process_id) == ("node7:8476", 4, 3)
    assert layout.local_device_ids == (0, 1)


def test_slurm_is_left_to_jax_but_for_the_coordinator():
    environ = {
        "SLURM_STEP_NODELIST": "rack[001-004]-ib",
        "SLURM_NTASKS": "8",
        "JAX_COORDINATOR_ADDRESS": "rack001-ib:9000",
    }
    assert find_layout(NONE, environ) == Layout("rack001-ib:9000", None, None, None, "SLURM")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CWCL_NUM_PROCESSES": "2"}, "CWCL_PROCESS_ID=''"),
        ({"CWCL_NUM_PROCESSES": "2", "CWCL_PROCESS_ID": "one"}, "CWCL_PROCESS_ID='one'"),
        ({"CWCL_NUM_PROCESSES": "2", "CWCL_PROCESS_ID": "0"}, "host:port"),
        (
            {
                "CWCL_NUM_PROCESSES": "2",
                "CWCL_PROCESS_ID": "2",
                "JAX_COORDINATOR_ADDRESS": "a:1",
            },
            r"process_id=2 must lie in 0\.\.2-1",
        ),
    ],
)
def test_incomplete_variables_are_errors(environ, message):
    with pytest.raises(ConfigError, match=message):
        find_layout(NONE, environ)


def test_loopback_coordinator_is_refused_for_several_hosts_only():
    layout = Layout("127.0.0.1:80", 2, 0, None, "here")
    check_addresses(layout, {})
    with pytest.raises(ConfigError, match="loopback address, but the job has several hosts"):
        check_addresses(layout, {"SLURM_STEP_NUM_NODES": "2"})


def test_differing_processes_are_named():
    digests = [["a", "b"], ["a", "b"], ["a", "b"], ["a", "c"]]
    assert distributed.differing(["data", "settings"], digests) == {"settings": [3]}


def test_exit_codes():
    assert exit_code(ConfigError("x")) == BAD_CONFIG
    assert exit_code(RuntimeError("x")) == FAILED
    assert exit_code(SystemExit(75)) == 75


_CHILD = """
import os, sys
from pathlib import Path
from cwcl_jax.cli import exit_code
from cwcl_jax.config import from_json
from cwcl_jax.training import distributed
workdir = Path(sys.argv[1])
config = from_json((workdir.parent / "experiment.json").read_text())
distributed.initialize(config.distributed)
from cwcl_jax.training import run
if sys.argv[2:] == ["fail"] and os.environ["CWCL_PROCESS_ID"] == "1":
    def fail(*arguments, **options):
        raise RuntimeError("no such luck")
    run.make_writers = run.DeviceInput = fail
sys.exit(
    distributed.run_main(
        lambda watchdog: run.train(config, workdir, watchdog),
        config.distributed,
        code_of=exit_code,
        logs=workdir / "logs",
    )
)
"""


def launch(workdir, processes, devices, *arguments):
    command = [sys.executable, str(ROOT / "launch/local.py"), "-n", str(processes)]
    command += ["-d", str(devices), "--grace", "5", "--"]
    command += [sys.executable, "-c", _CHILD, str(workdir), *arguments]
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        ["timeout", "-s", "KILL", "200", *command],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def losses(workdir):
    return [record["loss"] for record in read_json_lines(workdir / "metrics.jsonl")]


def metrics(workdir):
    return [task["metrics"] for task in json.loads((workdir / "results.json").read_text())]


@pytest.mark.multiprocess
def test_two_processes_give_the_losses_of_one(tmp_path):
    (tmp_path / "experiment.json").write_text(to_json(toy_config()))
    one = launch(tmp_path / "one", 1, 4)
    assert one.returncode == DONE, one.stdout
    two = launch(tmp_path / "two", 2, 2)
    assert two.returncode == DONE, two.stdout
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    # Only one process talks, and the evaluation agrees.
    assert not re.search(r"^\[1\] tower", two.stdout, re.MULTILINE)
    results = [
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")
    ]
    assert results[0][0]["metrics"] == results[1][0]["metrics"]


@pytest.mark.multiprocess
def test_exception_on_one_process_ends_the_job_within_seconds(tmp_path):
    (tmp_path / "experiment.json").write_text(to_json(toy_config()))
    result = launch(tmp_path / "run", 2, 1, "fail")
    assert result.returncode not in (DONE, -signal.SIGKILL), result.stdout
    assert "[process 1 of 2] RuntimeError: no such luck" in result.stdout
