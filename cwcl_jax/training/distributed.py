"""One or many processes: how they find each other, agree and fail together.

JAX's distributed runtime does the work. This module adds the origin of its settings, an end of the
whole job within seconds if one process fails, and a check at the start that all processes run the
same program. `stopping` handles how they stop together, `watchdog` how a hanging process is
detected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax

from cwcl_jax.config import ConfigError
from cwcl_jax.exit_codes import BAD_CONFIG
from cwcl_jax.training.coordination import barrier, gather, hosts_service, part
from cwcl_jax.training.options import DistributedConfig
from cwcl_jax.training.process_logs import ProcessLog, open_process_log
from cwcl_jax.training.watchdog import Watchdog

# Seconds that failing processes wait for others with the same failure: those that find the same
# mistake, and those that hang at the same point, whose watchdogs fire a tick and a few steps apart.
_LAST_MEETING = 10.0
# Extra seconds of the process with the coordination service if not all came to such a meeting: jax
# aborts every process when the service ends.
_HEAD_START = 1.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of this process among all processes.

    Attributes:
      coordinator: "host:port" of process 0; None for jax's own detection.
      num_processes: number of processes of the job; None likewise.
      process_id: number of this process; None likewise.
      local_device_ids: the devices that this process uses; None for all that it sees.
      found_in: where this was read, for messages.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: tuple[int, ...] | None
    found_in: str


def find_layout(config: DistributedConfig, environ: Mapping[str, str]) -> Layout | None:
    """Returns the layout from the settings, the environment or jax's detection, or None (alone).

    Variables: JAX_COORDINATOR_ADDRESS, CWCL_NUM_PROCESSES, CWCL_PROCESS_ID, JAX_LOCAL_DEVICE_IDS
    (jax itself reads only the first and the last).

    Raises:
      ConfigError: settings or variables that are incomplete or contradict each other.
    """
    devices = _device_ids(environ.get("JAX_LOCAL_DEVICE_IDS", ""))
    if config.num_processes:
        return _checked(
            Layout(
                config.coordinator_address,
                config.num_processes,
                config.process_id,
                devices,
                "config.distributed",
            )
        )
    names = ("CWCL_NUM_PROCESSES", "CWCL_PROCESS_ID")
    if any(environ.get(name) for name in names):
        count, process = (_integer(name, environ.get(name, "")) for name in names)
        address = environ.get("JAX_COORDINATOR_ADDRESS", "")
        found = "JAX_COORDINATOR_ADDRESS, " + ", ".join(names)
        return _checked(Layout(address, count, process, devices, found))
    detected = _detected(environ)
    if detected is None:
        return None
    address = environ.get("JAX_COORDINATOR_ADDRESS") or None
    return Layout(address, None, None, devices, detected)


def _detected(environ: Mapping[str, str]) -> str | None:
    """Returns the cluster whose variables jax understands, if it runs several processes."""
    if environ.get("SLURM_STEP_NODELIST") and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    # Variables of GKE. Hosts reached by gcloud have none, and jax asks their metadata server.
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    several = _several_tpu_hosts() if hosts is None else len(hosts.split(",")) > 1
    return "Cloud TPU" if several else None


def _several_tpu_hosts() -> bool:
    """Returns whether this machine's metadata server reports a TPU slice of several hosts.

    Raises:
      ConfigError: the machine has TPUs, but the server does not answer.
    """
    # jax.distributed.initialize asks the same. The class is not public, so if jax moves it, only
    # this way of starting is lost.
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    except ImportError:
        return False
    try:
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    except OSError as error:
        raise ConfigError(
            f"this machine has TPUs, but its metadata server does not report the number of hosts: "
            f"{error}; set TPU_SKIP_MDS_QUERY=1 if there is no such server"
        ) from error


def _device_ids(text: str) -> tuple[int, ...] | None:
    return tuple(int(part) for part in text.split(",")) if text else None


def _integer(name: str, text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ConfigError(f"{name}={text!r} must be a number, 0 or more; set it in every process")
    return int(text)


def _checked(layout: Layout) -> Layout | None:
    where = layout.found_in
    if layout.num_processes == 1:
        return None
    if not layout.coordinator or ":" not in layout.coordinator:
        raise ConfigError(
            f"{where}: the coordinator's address {layout.coordinator!r} must be host:port of "
            "process 0"
        )
    if layout.process_id is None or not 0 <= layout.process_id < (layout.num_processes or 0):
        raise ConfigError(
            f"{where}: process_id={layout.process_id} must be in 0..{layout.num_processes}-1"
        )
    return layout


def check_addresses(layout: Layout, environ: Mapping[str, str]) -> None:
    """Raises ConfigError for addresses with which several hosts would wait for each other forever.

    A coordinator at 127.0.0.1 is every host's own. A host whose name resolves to a loopback address
    offers that address to its peers, and gloo then hangs without a message.
    """
    if int(environ.get("SLURM_STEP_NUM_NODES", environ.get("CWCL_NUM_HOSTS", "1"))) < 2:
        return
    if layout.coordinator and _is_loopback(layout.coordinator.rpartition(":")[0]):
        raise ConfigError(
            f"{layout.found_in}: the coordinator {layout.coordinator} is a loopback address, but "
            "the job has several hosts; give the first host's name or address"
        )
    name = socket.gethostname()
    if _is_loopback(name):
        raise ConfigError(
            f"this host's name {name!r} resolves to a loopback address, which its peers cannot "
            "reach; correct its line in /etc/hosts"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return False


def initialize(config: DistributedConfig) -> None:
    """Joins the job, if there is one; must be called before anything uses a device.

    Raises:
      ConfigError: invalid settings.
    """
    layout = find_layout(config, os.environ)
    if layout is None:
        return
    check_addresses(layout, os.environ)
    jax.distributed.initialize(
        coordinator_address=layout.coordinator,
        num_processes=layout.num_processes,
        process_id=layout.process_id,
        local_device_ids=layout.local_device_ids,
        initialization_timeout=config.initialization_timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
        shutdown_timeout_seconds=int(config.shutdown_timeout) or 300,
        coordinator_bind_address=bind_address(layout.coordinator),
    )


def bind_address(coordinator: str | None) -> str | None:
    """Returns where the coordination service listens: at 127.0.0.1 only if all processes are local.

    None leaves the choice to jax, which listens on all interfaces without authentication.
    """
    host, _, port = (coordinator or "").rpartition(":")
    return f"127.0.0.1:{port}" if host and _is_loopback(host) else None


def is_primary() -> bool:
    """Returns whether this process writes logs and tables."""
    return jax.process_index() == 0


def end_job(code: int) -> NoReturn:
    """Ends this process at once, and with it the job: no barrier waits for it.

    Leaving by an exception instead would hold all processes in jax's shutdown barrier for minutes.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk must not keep it alive
            stream.flush()
    os._exit(code)


def run_main(
    main: Callable[[Watchdog], int],
    config: DistributedConfig,
    *,
    code_of: Callable[[BaseException], int],
    logs: Path | None = None,
) -> int:
    """Runs `main` under the watchdog and returns the exit code.

    With several processes, an exception in any of them ends the job.

    Args:
      main: gets the watchdog, in its phase "startup", and returns the exit code.
      code_of: returns the exit code for an exception.
      logs: folder for a log file of each process, if the job has several.
    """
    log = open_process_log(logs)

    def end_overdue(code: int) -> None:
        _leave_together("overdue")
        os._exit(code)

    with Watchdog.from_config(config, outputs=log.last_words, end=end_overdue) as watchdog:
        try:
            with watchdog.phase("startup"):
                code = main(watchdog)
            with watchdog.phase("shutdown"):
                if jax.distributed.is_initialized():
                    jax.distributed.shutdown()
            return code
        except BaseException as error:
            # the exception may be caused by another process that left because its watchdog fired
            watchdog.hold()
            if not jax.distributed.is_initialized():
                raise
            _say_exception(log, error)
            code = code_of(error)
            if code == BAD_CONFIG:
                # Usually all processes find the same mistake: each may report it and exit with this
                # code.
                _leave_together("bad configuration")
            end_job(code)


def _leave_together(name: str) -> None:
    """Waits until every process is ready to leave, but not forever.

    The processes that met leave the coordination service before any of them exits: the end of its
    process aborts all that are still connected, however little work they had left.
    """
    parted = threading.Event()

    def meet() -> None:
        with contextlib.suppress(Exception):
            barrier(name, _LAST_MEETING)
            part()
            parted.set()

    if jax.distributed.is_initialized():
        # In a thread, because neither a frozen service nor a backend that never starts may keep the
        # process here.
        meeting = threading.Thread(target=meet, name="last meeting", daemon=True)
        meeting.start()
        meeting.join(2 * _LAST_MEETING)
        if hosts_service() and not parted.is_set():
            time.sleep(_HEAD_START)


def _say_exception(log: ProcessLog, error: BaseException) -> None:
    prefix = f"[process {jax.process_index()} of {jax.process_count()}] "
    text = "".join(traceback.format_exception(error))
    if isinstance(error, ConfigError):
        text = f"error: {error}"
    log.say("".join(prefix + line + "\n" for line in text.splitlines()))


def check_agreement(facts: Mapping[str, str], timeout: float) -> None:
    """Raises ConfigError, on every process, if one of `facts` differs between processes.

    Args:
      facts: values that must be equal, by name, for example {"settings": config_hash(config)}.
      timeout: seconds to wait for the other processes.
    """
    names = sorted(facts)
    mine = json.dumps([_digest(facts[name]) for name in names])
    everyone = [json.loads(text) for text in gather("agreement", mine, timeout)]
    different = differing(names, everyone)
    if not different:
        return
    # Only now the facts themselves are exchanged.
    values = gather("disagreement", json.dumps(dict(facts)), timeout)
    lines = []
    for name, processes in different.items():
        here, there = (json.loads(values[process])[name] for process in (0, processes[0]))
        listed = ", ".join(map(str, processes))
        lines.append(f"{name} (process {listed}): {_difference(here, there)}")
    raise ConfigError(
        "the processes of this job do not agree; differences from process 0: " + "; ".join(lines)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing(names: Sequence[str], digests: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Returns name -> processes whose digest differs from process 0's.

    `digests` are by process, then by name.
    """
    result = {}
    for position, name in enumerate(names):
        ranks = [r for r, row in enumerate(digests) if row[position] != digests[0][position]]
        if ranks:
            result[name] = ranks
    return result


def _difference(here: str, there: str) -> str:
    """Returns the first parts in which two texts differ."""
    first = next(
        (i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b),
        min(len(here), len(there)),
    )
    start = max(first - 20, 0)
    return f"{there[start : first + 30]!r} there, {here[start : first + 30]!r} in process 0"


def code_version() -> str:
    """Returns a hash of the package's source files."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compiler_flags(environ: Mapping[str, str]) -> str:
    """Returns the flags that affect the compiled program; processes must agree on them."""
    names = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
    return "; ".join(f"{name}={environ.get(name, '')}" for name in names)
