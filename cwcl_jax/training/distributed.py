"""One process or many: how they find each other, agree, stop together and fail together.

JAX's distributed runtime is the engine. What is added: where its settings come from, a process
that fails ends the whole job within seconds, a request to stop reaches every process at the same
step, and a start-up check that all processes run the same thing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import os
import re
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from cwcl_jax.config import ConfigError
from cwcl_jax.training.options import DistributedConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where this process stands among all of them.

    Attributes:
      coordinator: "host:port" of process 0; None leaves it to jax's own detection.
      num_processes: of the job; None likewise.
      process_id: of this process; None likewise.
      local_device_ids: the devices that this process uses; None for all that it sees.
      found_in: where this was read, for messages.
    """

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    local_device_ids: tuple[int, ...] | None
    found_in: str


def find_layout(config: DistributedConfig, environ: Mapping[str, str]) -> Layout | None:
    """The settings' layout, else the environment's, else what jax can detect, else None: alone.

    Variables: JAX_COORDINATOR_ADDRESS, CWCL_NUM_PROCESSES, CWCL_PROCESS_ID, JAX_LOCAL_DEVICE_IDS
    (jax itself reads the first and the last only).

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
    """The name of a cluster whose variables jax understands, if it runs several processes."""
    if environ.get("SLURM_STEP_NODELIST") and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return "SLURM"
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "Cloud TPU"
    return None


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
            f"{where}: process_id={layout.process_id} must lie in 0..{layout.num_processes}-1"
        )
    return layout


def check_addresses(layout: Layout, environ: Mapping[str, str]) -> None:
    """Raises ConfigError for addresses with which several hosts would wait for each other for ever.

    A coordinator at 127.0.0.1 is every host's own; a host whose name resolves to a loopback
    address offers that address to its peers, and gloo then hangs without a word.
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
    """Joins the job, if there is one; must come before anything touches a device.

    Raises:
      ConfigError: settings that cannot work.
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
    )


def is_primary() -> bool:
    """Whether this process writes logs and tables."""
    return jax.process_index() == 0


def end_job(code: int) -> NoReturn:
    """Ends this process at once, and with it the job: no barrier waits for it.

    Leaving by an exception instead holds all processes in jax's shutdown barrier for minutes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_main(main: Callable[[], int], *, code_of: Callable[[BaseException], int]) -> int:
    """Runs `main`; with several processes, an exception in any ends the job within seconds.

    Args:
      main: returns the exit code.
      code_of: exit code for an exception.
    """
    try:
        return main()
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        rank = jax.process_index()
        text = "".join(traceback.format_exception(error))
        prefix = f"[process {rank} of {jax.process_count()}] "
        print("".join(prefix + line + "\n" for line in text.splitlines()), file=sys.stderr)
        end_job(code_of(error))


def check_agreement(facts: Mapping[str, str]) -> None:
    """Raises ConfigError, on every process, if one of `facts` differs between processes.

    Args:
      facts: what must be equal, by name, for example {"settings": config_hash(config)}.
    """
    if jax.process_count() == 1:
        return
    names = sorted(facts)
    digests = np.stack([_digest(facts[name]) for name in names])
    everyone = np.asarray(multihost_utils.process_allgather(digests))
    differences = [
        f"{name} (process {', '.join(map(str, ranks))})"
        for name, ranks in _differing(names, everyone).items()
    ]
    if differences:
        raise ConfigError(
            "the processes of this job do not run the same thing; what differs from process 0: "
            + "; ".join(differences)
        )


def _digest(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.uint32)


def _differing(names: Sequence[str], digests: np.ndarray) -> dict[str, list[int]]:
    """Names -> processes whose digest is not process 0's. `digests`: (processes, names, words)."""
    result = {}
    for position, name in enumerate(names):
        ranks = np.flatnonzero((digests[:, position] != digests[0, position]).any(axis=-1))
        if len(ranks):
            result[name] = ranks.tolist()
    return result


class StopSignal:
    """SIGTERM and Ctrl-C as a request to save and stop; a second Ctrl-C ends at once.

    With several processes jax's runtime receives SIGTERM and makes all of them see the request at
    the same step; Ctrl-C is left alone, since launchers turn it into SIGTERM.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether all processes should save after `step` and stop.

        Call it at every step with consecutive numbers: jax's agreement counts them.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
