"""Shared parts of the benchmarks: fresh processes, alternating rounds, tables and JSON files."""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from cwcl_jax import cli

Row = dict[str, Any]
T = TypeVar("T")


def define(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the option that every benchmark has."""
    where = f"runs/benchmark_{name}"
    parser.add_argument("--output", type=cli.folder, default=where, help="folder for the results")


def define_job(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a benchmark whose measurements run in fresh processes."""
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="limit of a measurement in seconds"
    )
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)


def report(output: Path, name: str, tables: Mapping[str, Sequence[Row]], columns: Any) -> None:
    """Writes NAME.json and NAME.md, and prints the tables.

    Args:
      tables: title -> rows.
      columns: title -> names of its columns.
    """
    text = "\n".join(f"{title}\n\n{markdown(tables[title], columns[title])}" for title in tables)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(tables, indent=1))
    (output / f"{name}.md").write_text(text)
    print(text)


def define_rates(parser: argparse.ArgumentParser, name: str, rounds: int) -> None:
    """Adds the options of a benchmark of rates."""
    add = parser.add_argument
    add("--seconds", type=float, default=2.0, help="seconds per measurement")
    add("--threads", type=cli.at_least(0), default=0, help="reader threads; 0: one per usable core")
    add("--batch", type=cli.at_least(1), default=128, help="pictures in a batch")
    add(
        "--rounds",
        type=cli.at_least(1),
        default=rounds,
        help="rounds over all kinds; medians are reported",
    )
    define(parser, name)


def code_of(rows: Sequence[Row]) -> int:
    """Returns the exit code: FAILED if a measurement failed, unless it was left out."""
    told = [row["failed"] for row in rows if "failed" in row]
    return cli.DONE if all(text.startswith("left out") for text in told) else cli.FAILED


def markdown(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Returns a Markdown table with one line for each row; missing cells are empty."""
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{kind} {_shown(size)}" for kind, size in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interleaved(
    cases: Mapping[str, Callable[[], T]], *, rounds: int = 1, seconds: float = 0.0
) -> dict[str, list[T]]:
    """Returns the results of every case, one per round, so that a busy machine slows all equally.

    Args:
      rounds: minimal number of rounds.
      seconds: minimal total time.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name, case in cases.items():
            found[name].append(case())
        done += 1
    return found


class Rate(NamedTuple):
    """Examples per second, and CPU milliseconds per example (stable on a busy machine)."""

    per_second: float
    cpu_ms: float


def rate(step: Callable[[int], int], seconds: float, threads: int = 1) -> Rate:
    """Returns the rate of `threads` threads that call step(0), step(1), ...

    Each call returns the number of examples it processed.
    """

    def work(first: int) -> int:
        done, number = 0, first
        while not done or time.perf_counter() - begin < seconds:
            done += step(number)
            number += threads
        return done

    begin, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    used = time.process_time() - cpu
    return Rate(done / (time.perf_counter() - begin), 1000 * used / done)


RATES = ("source", "per_second", "cpu_ms", "ratio", "cpu_ratio")


def rate_rows(found: Mapping[str, Sequence[Rate]], baseline: str) -> list[Row]:
    """Returns medians over the rounds, with ratios to the baseline's rate of the same round."""
    rows = []
    for name, rates in found.items():
        pairs = list(zip(rates, found[baseline], strict=True))
        rows.append(
            {
                "source": name,
                "per_second": statistics.median(rate.per_second for rate in rates),
                "cpu_ms": statistics.median(rate.cpu_ms for rate in rates),
                "ratio": statistics.median(a.per_second / b.per_second for a, b in pairs),
                "cpu_ratio": statistics.median(a.cpu_ms / b.cpu_ms for a, b in pairs),
                "rounds": [rate._asdict() for rate in rates],
            }
        )
    return rows


def run_fresh(
    module: str,
    job: Row,
    timeout: float,
    *,
    processes: int = 1,
    devices: int = 0,
    platform: str = "cpu",
) -> Row:
    """Runs `python -m module --job=JSON` and returns the job with its result or "failed".

    The last output line of the command is its result as JSON.

    Args:
      processes: number of processes of the job, on this machine; the first one returns the result.
      devices: devices of each process; 0 leaves them unchanged.
      platform: kind of devices, "cpu" or "cuda".
    """
    command = [sys.executable, "-m", module, f"--job={json.dumps(job)}"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = [
        subprocess.Popen(
            command,
            env=os.environ
            | (
                _place(rank, processes, port) | devices_of(rank, devices, platform)
                if devices
                else {}
            ),
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        output, errors = children[0].communicate(timeout=timeout)
        for child in children[1:]:
            child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        return job | {"failed": f"no result after {timeout:.0f} s"}
    finally:
        for child in children:
            child.kill()
            child.communicate()
    if children[0].returncode:
        last = (errors.strip() or f"exit code {children[0].returncode}").splitlines()[-1]
        return job | {"failed": last[:200]}
    return job | json.loads(output.strip().splitlines()[-1])


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "CWCL_NUM_PROCESSES": str(processes),
        "CWCL_PROCESS_ID": str(rank),
    }


def devices_of(rank: int, devices: int, platform: str) -> dict[str, str]:
    """Returns environment variables that give a process its CPU devices or its share of GPUs."""
    if platform == "cpu":
        count = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        threads = os.environ.get("PJRT_NPROC", "32")
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PJRT_NPROC": threads}
    share = range(rank * devices, (rank + 1) * devices)
    return {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ",".join(map(str, share))}


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
