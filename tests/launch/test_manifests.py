"""The manifests are what the API server accepts, and wire the processes together as needed."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cwcl_jax.cli import BAD_CONFIG, DONE, PREEMPTED
from cwcl_jax.training.distributed import find_layout
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.options import DistributedConfig
from launch import local

pytest.importorskip("yaml", reason="PyYAML is in the test extra")
from tests import xla_flags
from tests.launch.kubernetes import JOBSET, check_fields, documents, jobs, pods

ROOT = Path(__file__).parent.parent.parent
FILES = ["indexed_job.yaml", "jobset_gpu.yaml", "jobset_tpu.yaml"]
GPU_FILES = FILES[:2]


def validate(document):
    """Against the API's schemas, unknown fields refused; a JobSet's inner Jobs as Jobs."""
    validator = pytest.importorskip("kubernetes_validate", reason="it is in the test extra")
    if document["kind"] != "JobSet":
        return validator.validate(document, "1.33", strict=True)
    assert document["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    check_fields(document["spec"], JOBSET, "spec")
    for name, _, spec in jobs(document):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
        validator.validate(job, "1.33", strict=True)


@pytest.mark.parametrize("name", FILES)
def test_manifest_is_valid_strictly(name):
    for document in documents(name):
        validate(document)


def test_the_validation_notices_a_misspelt_field():
    for path in (["spec"], ["spec", "template", "spec"]):
        document = copy.deepcopy(documents("indexed_job.yaml")[1])
        place = document
        for part in path:
            place = place[part]
        place["backofLimit"] = 3
        with pytest.raises(Exception, match="backofLimit"):
            validate(document)
    document = copy.deepcopy(documents("jobset_gpu.yaml")[0])
    document["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJob"
    with pytest.raises(ValueError, match=r"rules\[0\]\.action='FailJob' is not one of"):
        validate(document)
    del document["spec"]["failurePolicy"]
    document["spec"]["network"]["enableDNS"] = True
    with pytest.raises(ValueError, match=r"spec\.network\.enableDNS is unknown"):
        validate(document)


def made(name):
    """The pods of a manifest, and the one Job that makes them."""
    (document,) = (d for d in documents(name) if d["kind"] in ("Job", "JobSet"))
    ((_, _, spec),) = jobs(document)
    return pods(document), spec


def processes(pod, monkeypatch, gpus):
    """Environments of the processes that a pod of GPUs starts, by its own command line."""
    for name, value in (pod.environ | {"CUDA_VISIBLE_DEVICES": gpus}).items():
        monkeypatch.setenv(name, value)
    start = pod.command.index("launch/local.py")
    options = local.parse(pod.command[start + 1 :])
    assert options.command[:3] == ["python", "-m", "cwcl_jax.train"]
    return [local.environment(options, 0, rank) for rank in range(options.processes)]


@pytest.mark.parametrize("name", GPU_FILES)
def test_every_gpu_has_a_process_that_finds_the_coordinator_and_its_place(name, monkeypatch):
    all_pods, spec = made(name)
    gpus = "0,1,2,3,4,5,6,7"
    made_here = [env for pod in all_pods for env in processes(pod, monkeypatch, gpus)]
    layouts = [find_layout(DistributedConfig(), env) for env in made_here]
    count = 8 * spec["completions"]
    assert [layout.process_id for layout in layouts] == list(range(count))
    assert {layout.num_processes for layout in layouts} == {count}
    assert {layout.coordinator for layout in layouts} == {f"{all_pods[0].host}:8476"}
    assert {env["CWCL_NUM_HOSTS"] for env in made_here} == {str(spec["completions"])}
    assert [env["CUDA_VISIBLE_DEVICES"] for env in made_here[:8]] == gpus.split(",")
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    (local_grace,) = (w for w in all_pods[0].command if w.startswith("--grace="))
    assert 60 <= int(local_grace.removeprefix("--grace=")) < grace


@pytest.mark.parametrize("name", FILES)
def test_pods_are_restarted_by_exit_code(name):
    _, spec = made(name)
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    rules = spec["podFailurePolicy"]["rules"]
    by_code = {rule["onExitCodes"]["values"][0]: rule for rule in rules if "onExitCodes" in rule}
    assert by_code[BAD_CONFIG]["action"] == "FailJob"
    assert by_code[PREEMPTED]["action"] == "Ignore"
    template = spec["template"]["spec"]
    assert {r["onExitCodes"]["containerName"] for r in by_code.values()} == {
        c["name"] for c in template["containers"]
    }
    assert template["restartPolicy"] == "Never"
    assert template["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", FILES)
def test_the_command_sources_its_environment_and_becomes_python(name, tmp_path):
    all_pods, _ = made(name)
    *shell, python, module, entry, config, workdir = all_pods[0].command
    assert (python, module, entry) == ("python", "-m", "cwcl_jax.train")
    shell = shell[:4]
    assert config.startswith("--config=configs/")
    assert (ROOT / config.removeprefix("--config=").split(":")[0]).exists()
    assert workdir.startswith("--workdir=/runs/")
    shown = subprocess.run(
        [*shell, "sh", "-c", 'echo $$ "$JAX_COMPILATION_CACHE_DIR" "$1"', "sh", "two words"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"HOME": "/home/x"},
    )  # fmt: skip
    assert shown.stdout.endswith(" two words\n")
    assert "compil" in shown.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_indexed_job_trains_as_local_processes(tmp_path, monkeypatch):
    """A process of every pod, by its command and environment; names of hosts and run exchanged."""
    all_pods, _ = made("indexed_job.yaml")
    settings = ["--config=tests/training/toy_file.py", f"--workdir={tmp_path}/run"]
    children = []
    with local.held_port() as holder:
        port = holder.getsockname()[1]
        for pod in all_pods:
            (environ,) = processes(pod, monkeypatch, "0")
            environ |= {
                "JAX_COORDINATOR_ADDRESS": pod.environ["JAX_COORDINATOR_ADDRESS"].replace(
                    f"{all_pods[0].host}:8476", f"127.0.0.1:{port}"
                ),
                "CWCL_NUM_HOSTS": "1",
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, "-m", "cwcl_jax.train", *settings]
            environ["XLA_FLAGS"] = xla_flags.with_devices(1)
            with (tmp_path / pod.host).open("w") as output:
                children.append(
                    subprocess.Popen(
                        ["timeout", "-s", "KILL", "600", *command],
                        cwd=ROOT,
                        env=environ,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        codes = [child.wait() for child in children]
    text = "\n".join((tmp_path / pod.host).read_text() for pod in all_pods)
    assert codes == [DONE] * len(all_pods), text
    records = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    steps = [record["step"] for record in records if "loss" in record]
    assert steps == [1, 2, 3, 4]
