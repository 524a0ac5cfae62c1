"""Runs a measurement in a process of its own, so that peak memory is its own."""

import json
import subprocess
import sys
from typing import Any


def run_fresh(module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Runs `python -m module --job=JSON`, whose last output line is JSON; adds "failed" if not."""
    command = [sys.executable, "-m", module, f"--job={json.dumps(job)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return job | {"failed": f"no result after {timeout:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return job | {"failed": last[:200]}
    return job | json.loads(done.stdout.strip().splitlines()[-1])


def peak_resident_bytes() -> int:
    """The most memory this process has had in use."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
