"""A run on a bucket, with faults: run by hand, with `pip install "moto[server]" s3fs`.

    python -m tests.drill_store [--part=run,tars,jobs] [--errors=0.05 --slow=0.02]

An S3-compatible server (moto's) stands on loopback behind a proxy that answers a share of all
requests with 500, half of them after the deed, and a share late. Then

    run   the toy run trains on a local disk, and on the bucket, where it is killed and resumed; the
          losses must be the same bit for bit, and so must the leaves of the exports. While it runs
          a second user of its folder is refused. It is evaluated, exported, and the export read
          again, all on the bucket.
    tars  tars are indexed and read, there and on the disk: same bytes; pairs a second, and
          requests for each example.
    jobs  two processes train on the bucket, each writing its part of the checkpoints; one reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cwcl_jax import load_model
from cwcl_jax.config import ConfigError
from cwcl_jax.data.sources import open_source
from cwcl_jax.paths import StorePath
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.workdir import only_user
from tests.data.making import jpeg, write_tar

TOY = "--config=tests/training/toy_file.py"
_SERVER = """
import sys, time
from moto.server import ThreadedMotoServer
ThreadedMotoServer(port=int(sys.argv[1]), verbose=False).start()
while True: time.sleep(60)
"""
# Of this machine's speed, or counted from each start on.
_PASSING = (
    "seconds_per_step", "examples_per_second", "data_wait", "mfu", "memory_gb", "tokens_cut",
    "skipped",
)  # fmt: skip


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def child(*arguments: str, port: int) -> Iterator[None]:
    """A process that serves on a port."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.2)
        yield
    finally:
        process.kill()


@contextlib.contextmanager
def bucket(errors: float, slow: float) -> Iterator[StorePath]:
    """A bucket behind the proxy; the environment says where it is."""
    server, proxy = free_port(), free_port()
    faults = (f"--errors={errors}", f"--slow={slow}", f"--port={proxy}", f"--to={server}")
    with (
        child("-c", _SERVER, str(server), port=server),
        child("-m", "tests.faulty_proxy", *faults, port=proxy),
    ):
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "drill",
            "AWS_SECRET_ACCESS_KEY": "drill",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy}",
        }
        made = urllib.request.Request(f"http://127.0.0.1:{server}/drill", method="PUT")
        urllib.request.urlopen(made).close()
        yield StorePath("s3://drill")


def counts() -> dict[str, int]:
    """Requests since the last call, by kind."""
    with urllib.request.urlopen(os.environ["AWS_ENDPOINT_URL"] + "/-/counts") as answer:
        return json.loads(answer.read())


def start(*arguments: str) -> subprocess.Popen[str]:
    """A command of the package."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> str:
    """Waits for a command; what it said."""
    said, _ = process.communicate()
    print(f"exit {process.returncode}  {' '.join(map(str, process.args[2:]))}", flush=True)  # type: ignore
    assert process.returncode == 0, said
    return said


def numbers(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run without those of speed."""
    records = read_json_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in _PASSING} for record in records]


def drill_run(place: StorePath, folder: Path, steps: int) -> None:
    """Trains, kills, resumes, evaluates, exports."""
    length = f"--config.total_steps={steps}"
    reference = start("cwcl_jax.train", TOY, length, f"--workdir={folder}/run")
    counts()
    workdir = place / "run"
    process = start("cwcl_jax.train", TOY, length, f"--workdir={workdir}")
    # Killed in the middle of a save: an object of step 4 is there, the last one is not.
    while process.poll() is None and not (workdir / "checkpoints" / "4").exists():
        time.sleep(0.1)
    held = (workdir / "lock.held").read_text().partition(",")[0]
    with pytest.raises(ConfigError, match=re.escape(f"another run is using {workdir} ({held})")):
        only_user(workdir).__enter__()
    assert f"process {process.pid} on " in held
    print("a second user is refused: the folder is used by", held)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    whole = [s for s in range(steps) if (workdir / f"checkpoints/{s}/commit_success.txt").exists()]
    print("killed; whole checkpoints:", whole, "requests:", counts(), flush=True)
    said = end(start("cwcl_jax.train", TOY, length, f"--workdir={workdir}"))
    print("\n".join(line for line in said.splitlines() if "resuming" in line or "again" in line))
    print("requests of the rest of the run:", counts())
    end(reference)
    for there, here in zip(numbers(workdir), numbers(folder / "run"), strict=True):
        differ = {name for name in there.keys() | here.keys() if there.get(name) != here.get(name)}
        assert not differ, (differ, there, here)
    print(f"{len(numbers(workdir))} records of metrics.jsonl are the same", flush=True)
    parts = [
        start("cwcl_jax.evaluate", f"--workdir={workdir}", f"--output={place}/results"),
        start("cwcl_jax.export", f"--source={folder}/run", f"--output={folder}/export"),
        start("cwcl_jax.export", f"--source={workdir}", f"--output={place}/export"),
    ]
    for part in parts:
        end(part)
    assert (place / "results/results.json").is_file()
    local, remote = (load_model(p / "export").leaves for p in (folder, place))
    assert local.keys() == remote.keys()
    for name in local:
        np.testing.assert_array_equal(local[name], remote[name])
    print(f"{len(local)} leaves of the exports are the same; requests: {counts()}", flush=True)


def drill_jobs(place: StorePath) -> None:
    """Two processes train, one reads."""
    workdir = place / "jobs"
    train = [sys.executable, "-m", "cwcl_jax.train", TOY, f"--workdir={workdir}"]
    end(start("launch.local", "-n", "2", "--", *train))
    parts = (workdir / "checkpoints/4/params").iterdir()
    names = sorted(part.name for part in parts if part.name.startswith("ocdbt.process_"))
    print("parts of the last checkpoint:", names, "requests:", counts(), flush=True)
    assert len(names) == 2, names
    print(len(load_model(workdir).leaves), "leaves, each as its checksum says")


def drill_tars(place: StorePath, folder: Path, count: int) -> None:
    """Indexes and reads tars on the bucket and on the disk."""
    picture = jpeg(1, 256, 256)
    for number in range(2):
        members = []
        for row in range(count // 2):
            members += [(f"{row:06d}.jpg", picture), (f"{row:06d}.txt", b"a caption of %d" % row)]
        write_tar(folder / f"{number}.tar", members)
        (place / f"tars/{number}.tar").upload(folder / f"{number}.tar")
    counts()
    begin = time.monotonic()
    remote = open_source(f"tars:{place}/tars/{{0..1}}.tar")
    print(f"indexed {count} samples in {time.monotonic() - begin:.1f} s; requests: {counts()}")
    open_source(f"tars:{place}/tars/{{0..1}}.tar")
    print(f"opened again; requests: {counts()}")
    local = open_source(f"tars:{folder}/{{0..1}}.tar")
    order = np.random.default_rng(0).permutation(count)
    fields = ("image", "text")
    for name, source in (("disk", local), ("bucket", remote)):
        for threads in (1, 16):
            begin, busy = time.monotonic(), time.process_time()
            with ThreadPoolExecutor(threads) as pool:
                got = list(pool.map(lambda i, s=source: s.read(int(i), fields), order))
            busy = (time.process_time() - busy) / count * 1e3
            speed, asked = count / (time.monotonic() - begin), counts()
            told = {k: f"{v / count:.2f}" for k, v in asked.items()}
            print(
                f"{name}, {threads} threads: {speed:.0f} pairs/s, {busy:.2f} ms of this process's "
                f"CPU a pair, requests a pair: {told}"
            )
            assert all(
                a["image"] == picture and a["text"] == f"a caption of {int(i) % (count // 2)}"
                for i, a in zip(order, got, strict=True)
            )
    assert local.fingerprint() == remote.fingerprint()


def main() -> None:
    """Runs the drill."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="tars,run,jobs", help="parts, separated by commas")
    parser.add_argument("--errors", type=float, default=0.05, help="share of answers that are 500")
    parser.add_argument("--slow", type=float, default=0.02, help="share that come 3 s late")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=600)
    options = parser.parse_args()
    parts = options.part.split(",")
    with tempfile.TemporaryDirectory() as folder, bucket(options.errors, options.slow) as place:
        if "tars" in parts:
            drill_tars(place, Path(folder), options.pairs)
        if "run" in parts:
            drill_run(place, Path(folder), options.steps)
        if "jobs" in parts:
            drill_jobs(place)
    print("done")


if __name__ == "__main__":
    main()
