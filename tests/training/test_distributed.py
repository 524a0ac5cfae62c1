"""How processes find each other, agree and stop."""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster

from cwcl_jax.cli import BAD_CONFIG, DONE, FAILED, PREEMPTED, WATCHDOG, exit_code
from cwcl_jax.config import ConfigError
from cwcl_jax.data.embeddings import EmbeddingStore
from cwcl_jax.training import distributed
from cwcl_jax.training.distributed import Layout, bind_address, check_addresses, find_layout
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.options import DistributedConfig
from cwcl_jax.training.run import _common_settings
from launch import local
from tests import xla_flags
from tests.training.jobs import CHILD, Job, run_job, write_experiment
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


class MetadataServer(http.server.BaseHTTPRequestHandler):
    """What Google's gives to the hosts of a TPU slice."""

    hosts = ""

    def do_GET(self):
        known = {
            "agent-worker-number": "1",
            "worker-network-endpoints": self.hosts,
            "tpu-env": "",
        }
        name = self.path.rpartition("/")[2]
        self.send_response(200 if name in known else 404)
        self.end_headers()
        self.wfile.write(known.get(name, "").encode())

    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize(
    ("hosts", "several"), [("a:1:10.0.0.2,b:2:10.0.0.3", True), ("a:1:10.0.0.2", False)]
)
def test_tpu_hosts_without_variables_are_found_by_the_metadata_server(monkeypatch, hosts, several):
    monkeypatch.setattr(MetadataServer, "hosts", hosts)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), MetadataServer) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found = find_layout(NONE, {})
        server.shutdown()
        thread.join()
    assert found == (Layout(None, None, None, None, "Cloud TPU") if several else None)
    # GKE's variables come first, also those of a single host; nobody answers any more.
    assert find_layout(NONE, {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    with pytest.raises(ConfigError, match="TPU_SKIP_MDS_QUERY=1"):
        find_layout(NONE, {})


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
            r"process_id=2 must be in 0\.\.2-1",
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


def test_a_job_of_one_machine_listens_to_itself_only():
    """jax listens on all interfaces, and a stranger's connection can end the job."""
    assert bind_address("127.0.0.1:1234") == bind_address("localhost:1234") == "127.0.0.1:1234"
    assert bind_address("192.0.2.7:1234") is None
    assert bind_address(None) is None


def test_differing_processes_are_named():
    digests = [["a", "b"], ["a", "b"], ["a", "b"], ["a", "c"]]
    assert distributed.differing(["data", "settings"], digests) == {"settings": [3]}


def test_exit_codes():
    assert exit_code(ConfigError("x")) == BAD_CONFIG
    assert exit_code(RuntimeError("x")) == FAILED
    assert exit_code(SystemExit(75)) == 75


def launch(workdir, processes, devices, *command):
    launcher = [sys.executable, str(ROOT / "launch/local.py"), "-n", str(processes)]
    return subprocess.run(
        ["timeout", "-s", "KILL", "600", *launcher, "-d", str(devices), "--", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags.with_devices(devices)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def losses(workdir):
    return [r["loss"] for r in read_json_lines(workdir / "metrics.jsonl") if "loss" in r]


def metrics(workdir):
    return [task["metrics"] for task in json.loads((workdir / "results.json").read_text())]


@pytest.mark.multiprocess
def test_two_processes_give_the_losses_of_one(tmp_path):
    write_experiment(tmp_path, toy_config())
    for name, processes, devices in (("one", 1, 4), ("two", 2, 2)):
        done = launch(tmp_path / name, processes, devices, *CHILD, str(tmp_path / name))
        assert done.returncode == DONE, done.stdout
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
    # Only one process talks; the other one has a file of its own.
    assert not re.search(r"^\[1\] tower", done.stdout, re.MULTILINE)
    files = sorted(path.name for path in (tmp_path / "two" / "logs").iterdir())
    assert files == ["process-0.log", "process-1.log"]
    assert "step 1/4" in (tmp_path / "two" / "logs" / "process-0.log").read_text()
    assert not (tmp_path / "one" / "logs").exists()


def test_processes_that_the_settings_lay_out_have_the_same_settings():
    def settings(**changes: Any) -> str:
        return _common_settings(toy_config(**changes))

    laid_out: dict[str, Any] = {
        "distributed.coordinator_address": "a:1",
        "distributed.num_processes": 2,
    }
    first, second = (settings(**laid_out, **{"distributed.process_id": rank}) for rank in (0, 1))
    assert first == second != settings(**laid_out, seed=1)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_the_settings_lay_out_run(tmp_path):
    """The first way of launch/README.md; each process has another process_id."""
    command = ["timeout", "-s", "KILL", "600", sys.executable, "-m", "cwcl_jax.train"]
    command += ["--config=tests/training/toy_file.py"]
    command += ["--config.total_steps=2", "--config.evaluation.tasks={}", f"--workdir={tmp_path}"]
    command += ["--config.distributed.num_processes=2"]
    environ = os.environ | {"XLA_FLAGS": xla_flags.with_devices(1)}
    with local.held_port() as holder:
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        command += [f"--config.distributed.coordinator_address={address}"]
        jobs = [
            subprocess.Popen(
                [*command, f"--config.distributed.process_id={rank}"],
                cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for rank in range(2)
        ]  # fmt: skip
        outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [DONE, DONE], outputs
    assert len(losses(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigterm_to_one_stops_all_while_features_are_made(tmp_path):
    cache = tmp_path / "cache"
    changes = {"data.keep_locked_features": True, "data.cache_dir": str(cache)}
    write_experiment(tmp_path, toy_config(**{"data.train": "scenes:train?n=20000"}, **changes))
    # Nobody is guilty, but every batch takes half a second.
    job = Job(tmp_path / "run", 2, fault={"place": "evaluation", "process": -1})
    job.wait_for(lambda: any((cache / "features").glob("*.lock")))
    os.kill(job.processes[1].pid, signal.SIGTERM)
    ending = job.end()
    assert ending.codes == [PREEMPTED, PREEMPTED], ending.output
    assert "stopped while features" in ending.output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_processes_that_differ_are_named_and_end_with_2(tmp_path):
    """Slow: two processes; what they compare is tested above."""
    write_experiment(tmp_path, toy_config())
    fault = {"place": "start", "action": "differ", "process": 1, "linger": 2}
    ending = run_job(tmp_path / "run", 2, fault=fault)
    assert ending.codes == [BAD_CONFIG, BAD_CONFIG], ending.output
    assert "do not agree" in ending.output
    assert "code (process 1): 'something else' there" in ending.output
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_process_that_does_not_come_is_named(tmp_path):
    """Slow: waits for limits of time; test_watchdog.py has them in one process."""
    write_experiment(tmp_path, toy_config(**{"distributed.barrier_timeout": 3.0}))
    ending = run_job(
        tmp_path / "run", 2, fault={"place": "start", "action": "hang", "process": 1}, frozen=[1]
    )
    assert ending.codes[0] == WATCHDOG, ending.output
    assert "waited 3 s for all 2 processes at 'start'; missing: process 1" in ending.output


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_the_default_run_does_not_depend_on_the_layout(tmp_path, processes, devices):
    """Losses, evaluation and embeddings of configs/lit_cwcl.py, for a few steps."""
    config = ["--config=configs/lit_cwcl.py"]
    few = ["--config.total_steps=4", "--config.global_batch_size=64"]
    few += ["--config.logging.every_steps=1", "--config.logging.tensorboard=False"]
    for task in ("shape", "colour", "combination", "retrieval"):
        line = f"scenes:test?task={task}&n=96"
        few += [f"--config.evaluation.tasks.{task}.source={line}"]
        few += [f"--config.evaluation.tasks.{task}.bootstrap=0"]
    for name, n, d in (("one", 1, 4), ("many", processes, devices)):
        python = [sys.executable, "-m"]
        done = launch(
            tmp_path, n, d, *python, "cwcl_jax.train", *config, *few,
            f"--workdir={tmp_path / name}",
        )  # fmt: skip
        assert done.returncode == DONE, done.stdout
        done = launch(
            tmp_path, n, d, *python, "cwcl_jax.embed", *config, "--source=scenes:train?n=200",
            "--dtype=float32", f"--output={tmp_path / name}-embeds",
        )  # fmt: skip
        assert done.returncode == DONE, done.stdout
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=1e-5)
    for mine, expected in zip(metrics(tmp_path / "many"), metrics(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(expected, abs=0.011)  # one of 96 items may be a near tie
    one, many = (EmbeddingStore(tmp_path / f"{name}-embeds") for name in ("one", "many"))
    for index in range(200):
        assert many[index][0] == one[index][0]
        np.testing.assert_allclose(many[index][1], one[index][1], atol=1e-5)
    print(f"\n{processes} x {devices}: {losses(tmp_path / 'many')}")
    print(f"one x 4: {losses(tmp_path / 'one')}")


_EMBED = """
import sys
from cwcl_jax.cli import exit_code
from cwcl_jax.embed import embed
from cwcl_jax.training import distributed, embedding
from cwcl_jax.training.options import DistributedConfig
from tests.training.toy import toy_config
import os, signal
distributed.initialize(DistributedConfig())
import jax
batches = [0]
def run(watchdog):
    def report(done, total, seconds):
        batches[0] += 1
        if sys.argv[2] == "term" and jax.process_index() == 1 and batches[0] == 6:
            os.kill(os.getpid(), signal.SIGTERM)
    import cwcl_jax.embed as module
    module._report = report
    return embed(
        toy_config(), workdir="", output=sys.argv[1], line="scenes:train?n=800", dtype="float32",
        batch_size=20, shard_size=80, watchdog=watchdog,
    )
sys.exit(distributed.run_main(run, DistributedConfig(), code_of=exit_code))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_embedding_stops_on_all_processes_and_goes_on(tmp_path):
    command = [sys.executable, "-c", _EMBED, str(tmp_path / "out")]
    stopped = launch(tmp_path, 2, 1, *command, "term")
    assert stopped.returncode == PREEMPTED, stopped.stdout
    assert "[local]" not in stopped.stdout  # nobody failed
    assert 0 < len(list((tmp_path / "out").glob("*.array_record"))) < 10
    done = launch(tmp_path, 4, 1, *command, "")
    assert done.returncode == DONE, done.stdout
    alone = launch(tmp_path, 1, 1, sys.executable, "-c", _EMBED, str(tmp_path / "alone"), "")
    assert alone.returncode == DONE, alone.stdout
    one, many = EmbeddingStore(tmp_path / "alone"), EmbeddingStore(tmp_path / "out")
    assert len(many) == 800
    for index in range(0, 800, 7):
        assert many[index][0] == one[index][0]
        np.testing.assert_array_equal(many[index][1], one[index][1])
