#!/usr/bin/env python3
"""Runs a command as several processes of one job on this machine.

    python launch/local.py -n 2 -d 2 -- python -m cwcl_jax.train --config=configs/lit_cwcl.py

starts two processes with two CPU devices each; with --gpus one process for each GPU of this
machine, or -n processes with -d GPUs each. On several machines, each of which runs this command:
CWCL_NUM_HOSTS, CWCL_HOST_ID (from 0) and JAX_COORDINATOR_ADDRESS (host:port of host 0) in the
environment. Output lines carry the process's number. SIGTERM and Ctrl-C reach every process; the
first that fails ends the others. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

PREEMPTED = 75


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-n", "--processes", type=int, default=0, help="processes (default 2; --gpus: all GPUs)"
    )
    parser.add_argument("-d", "--devices", type=int, default=1, help="devices of each (default 1)")
    parser.add_argument("--gpus", action="store_true", help="use GPUs instead of CPU devices")
    parser.add_argument("--port", type=int, default=0, help="coordinator's port; 0 finds one")
    parser.add_argument(
        "--grace", type=float, default=30.0, help="seconds between SIGTERM and SIGKILL (30)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args(argv)
    options.command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.command:
        parser.error("no command; write it after --")
    if options.processes < 0 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    if not options.processes:
        options.processes = len(visible_gpus()) // options.devices if options.gpus else 2
        if not options.processes:
            parser.error(f"--gpus: no {options.devices} GPUs here; -n says how many processes")
    return options


def visible_gpus() -> list[str]:
    """Returns the GPUs of CUDA_VISIBLE_DEVICES, or all that have a device file if it is not set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named:
        return named.split(",")
    files = os.listdir("/dev") if os.path.isdir("/dev") else []
    return [str(i) for i in range(sum(bool(re.fullmatch(r"nvidia\d+", f)) for f in files))]


def hosts() -> tuple[int, int]:
    """Returns the number of machines of the job, and the index of this one."""
    count = int(os.environ.get("CWCL_NUM_HOSTS") or 1)
    host = int(os.environ.get("CWCL_HOST_ID") or 0)
    if count > 1 and not (host < count and os.environ.get("JAX_COORDINATOR_ADDRESS")):
        raise SystemExit(
            f"local.py: CWCL_NUM_HOSTS={count} wants CWCL_HOST_ID from 0 to {count - 1} and "
            "JAX_COORDINATOR_ADDRESS=host:port of host 0"
        )
    return count, host


def held_port() -> socket.socket:
    """Returns a socket that reserves a free TCP port, on which process 0 can still listen.

    Process 0 needs seconds to start; a port that is not reserved may be taken by then.
    """
    holder = socket.socket()
    # The coordinator (gRPC) asks for the same, which is what lets both have the port.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def environment(options: argparse.Namespace, port: int, rank: int) -> dict[str, str]:
    """Returns the environment of process `rank` of this machine."""
    count, host = hosts()
    address = os.environ["JAX_COORDINATOR_ADDRESS"] if count > 1 else f"127.0.0.1:{port}"
    env = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "CWCL_NUM_PROCESSES": str(count * options.processes),
        "CWCL_PROCESS_ID": str(host * options.processes + rank),
        # Divides the reader threads among the processes.
        "CWCL_LOCAL_PROCESSES": str(options.processes),
        "PYTHONUNBUFFERED": "1",
    }
    if options.gpus:
        return env | {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus(options)[rank]),
            # All of them: with SLURM's variables set, jax would use only one.
            "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, range(options.devices))),
            # Without this, a GPU that cannot be used would mean a run on the CPU.
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda"),
        }
    flags = f"--xla_force_host_platform_device_count={options.devices}"
    return env | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        # With fewer threads than queued collectives, CPU devices can wait for each other forever.
        "PJRT_NPROC": os.environ.get("PJRT_NPROC", "32"),
        # Huge pages for what XLA allocates anew in every step: 7 % of a step's processor time.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    }


def gpus(options: argparse.Namespace) -> list[list[str]]:
    """Returns the GPUs of each process, in the order of CUDA_VISIBLE_DEVICES or from 0 on."""
    needed = options.processes * options.devices
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = named.split(",") if named else [str(i) for i in range(needed)]
    if len(visible) < needed:
        raise SystemExit(
            f"local.py: {options.processes} processes of {options.devices} GPUs need {needed}, but "
            f"CUDA_VISIBLE_DEVICES={named} names {len(visible)}; lower -n or -d"
        )
    return [visible[i * options.devices :][: options.devices] for i in range(options.processes)]


def ending(code: int) -> str:
    """Returns an exit code in words."""
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def first_failed(codes: Sequence[int | None]) -> tuple[int, int]:
    """Returns rank and exit code of the process that counts as the first to fail.

    If several failed since the last look, one with an exit code of its own comes before those that
    a signal ended: when one process fails, jax aborts the others.
    """
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda found: found[1] < 0)


def forward(stream: IO[str], rank: int) -> None:
    """Copies a process's output, each line with its number in front."""
    for line in stream:
        print(f"[{rank}] {line}", end="", flush=True)


class Job:
    """The processes, started together and ended together."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._kill_at: float | None = None
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._holder: socket.socket | None = None

    def start(self) -> None:
        """Starts the processes, unless `terminate` was called before."""
        options = self._options
        port = options.port
        if not port and hosts()[0] == 1:
            self._holder = held_port()
            port = self._holder.getsockname()[1]
        for rank in range(options.processes):
            if self._kill_at is not None:
                break
            try:
                process = subprocess.Popen(
                    options.command,
                    env=environment(options, port, rank),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    # A terminal's Ctrl-C must come through `terminate`, once.
                    start_new_session=True,
                )
            except OSError as error:
                raise SystemExit(
                    f"local.py: {options.command[0]!r} cannot be started: {error.strerror}"
                ) from error
            self._processes.append(process)
            reader = threading.Thread(target=forward, args=(process.stdout, rank), daemon=True)
            reader.start()
            self._readers.append(reader)
        if self._kill_at is not None:  # it came in between: the newest has not heard of it
            self.terminate()

    def terminate(self, *_: object) -> None:
        """Sends SIGTERM to all processes; `wait` sends SIGKILL after the grace time."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._options.grace
        for process in self._processes:
            self._send(process, signal.SIGTERM)

    def _send(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Sends a signal to a process that has not ended, and to its children."""
        if process.poll() is None:
            # As a signal handler this may come between the process's end and poll's own note of it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def wait(self) -> int:
        """Returns the exit code of the process that failed first; 0 if none failed."""
        first_failure = 0
        while True:
            # All of them: any() would not look at the processes after the first living one.
            codes = [process.poll() for process in self._processes]
            if not first_failure and any(codes):
                rank, first_failure = first_failed(codes)
                if first_failure != PREEMPTED:
                    print(f"[local] process {rank}: {ending(first_failure)}", flush=True)
                    self.terminate()
            if None not in codes:
                break
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                for process in self._processes:
                    self._send(process, signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(timeout=5)
        if self._holder is not None:
            self._holder.close()
        return 128 - first_failure if first_failure < 0 else first_failure


def main(argv: Sequence[str]) -> int:
    """Runs the job and returns its exit code."""
    job = Job(parse(argv))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, job.terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGHUP, job.terminate)
    job.start()
    return job.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
