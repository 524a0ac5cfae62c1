"""A real SLURM of two nodes on this machine: submit, detect, stop, requeue, resume, lose a node.

apt-get install --no-install-recommends slurm-wlm munge iproute2; then, as root,
pytest -m slurm tests/launch/test_slurm.py
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cwcl_jax.training.metrics import read_json_lines

ROOT = Path(__file__).parent.parent.parent
_LONGEST = 600.0

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


class Cluster:
    """The cluster of slurm_cluster.sh."""

    def __init__(self, folder):
        self.folder = folder
        self._process = subprocess.Popen(
            ["bash", str(Path(__file__).parent / "slurm_cluster.sh"), str(folder)],
            stdin=subprocess.PIPE,
        )

    def start(self):
        """Waits until the nodes are there."""
        file = self.folder / "pid"
        self.wait_for(file.exists, "the cluster")
        target = file.read_text().strip()
        self._inside = ["nsenter", "-t", target, "-m", "-n", f"--wd={ROOT}", "--"]
        self.wait_for(lambda: self("sinfo", "-hNo", "%T").count("idle") == 2, "two idle nodes")

    def __call__(self, *command, **options):
        """Output of a command inside of the cluster."""
        environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run(
            [*self._inside, *command],
            env=environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), **options},
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0 or command[0] == "sinfo", done.stderr
        return done.stdout

    def wait_for(self, condition, what):
        deadline = time.monotonic() + _LONGEST
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.logs()}"
            assert self._process.poll() is None, self.logs()
            time.sleep(0.2)

    def logs(self):
        files = [*self.folder.glob("*.out"), *(self.folder / "log").glob("slurm*.log")]
        return "\n".join(f"=== {f.name}\n{f.read_text()[-3000:]}" for f in files)

    def lose(self, node):
        """Kills a node's daemon and all that it runs, at once; returns when it is gone."""
        daemon = int((self.folder / f"slurmd.{node}.pid").read_text())
        steps = subprocess.run(
            ["pgrep", "-f", rf"slurmstepd: \[.*\]|slurmstepd .*{node}"],
            capture_output=True, text=True, check=False,
        ).stdout.split()  # fmt: skip
        mine = [pid for pid in map(int, steps) if _spool(pid, node)]
        tasks = [child for pid in mine for child in _children(pid)]
        for pid in [daemon, *mine, *tasks]:
            subprocess.run(["kill", "-9", str(pid)], check=False)

    def bring_back(self, node):
        self("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", node)

    def close(self):
        self._process.stdin.close()
        try:
            self._process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _spool(pid, node):
    """Whether a step's daemon belongs to `node`: its log is that node's."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return any(node in link for link in links)


def _children(pid):
    text = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in text.stdout.split()]


@pytest.fixture
def cluster(tmp_path):
    for program in ("slurmctld", "slurmd", "munged", "unshare", "nsenter", "ip"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install slurm-wlm munge iproute2")
    if os.geteuid() != 0:
        pytest.skip("namespaces of its own need root")
    made = Cluster(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_submit_stop_requeue_resume_and_lose_a_node(cluster, tmp_path):
    workdir, output = tmp_path / "run", tmp_path / "job.out"

    def steps():
        return [record["step"] for record in read_json_lines(workdir / "metrics.jsonl")]

    def starts():
        text = output.read_text() if output.exists() else ""
        return len(re.findall("train.sbatch: start", text))

    def seconds_until(condition, what):
        start = time.monotonic()
        cluster.wait_for(condition, what)
        return time.monotonic() - start

    job = cluster(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1",
        "--gpus-per-node=0", f"--output={output}", "launch/slurm/train.sbatch",
        "--config=tests/training/toy_file.py", f"--workdir={workdir}",
        "--config.total_steps=1000000", "--config.checkpoint.every_steps=100",
        "--config.logging.every_steps=10", "--config.distributed.heartbeat_timeout=10",
        PYTHON=sys.executable, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
    ).strip()  # fmt: skip
    cluster.wait_for(lambda: steps() and steps()[-1] > 100, "the first steps")
    logs = sorted(path.name for path in (workdir / "logs").iterdir())
    assert logs == ["process-0.log", "process-1.log"]  # jax found both tasks
    assert "coordinator rack001-ib:" in output.read_text()

    cluster("scancel", "--signal=TERM", job)
    stopped = seconds_until(lambda: "requeued" in output.read_text(), "the requeue after TERM")
    assert "train.sbatch: stopped and saved; requeued" in output.read_text()
    saved = int(re.findall(r"stopped after step (\d+), saved", output.read_text())[-1])
    again = seconds_until(lambda: starts() == 2, "the second start")
    cluster.wait_for(lambda: f"resuming after step {saved}\n" in output.read_text(), "resumption")
    # The third save after the stop waits for the files of the second, which are written meanwhile.
    cluster.wait_for(lambda: steps()[-1] > saved + 300, "more steps")

    cluster.lose("rack002-ib")
    lost = seconds_until(
        lambda: job not in cluster("squeue", "-h", "-t", "R", "-o", "%i").split(), "the loss"
    )
    cluster.bring_back("rack002-ib")
    back = seconds_until(lambda: starts() == 3, "the third start")
    cluster.wait_for(
        lambda: len(re.findall(r"resuming after step", output.read_text())) == 2, "resumption"
    )
    last = int(re.findall(r"resuming after step (\d+)", output.read_text())[-1])
    assert last >= saved + 100
    cluster.wait_for(lambda: steps()[-1] > last, "steps after the loss")
    cluster("scancel", job)
    print(
        f"\nTERM to requeued {stopped:.1f} s, to the next start {again:.1f} s; node lost: job "
        f"ended in {lost:.1f} s, next start {back:.1f} s after the node came back"
    )
