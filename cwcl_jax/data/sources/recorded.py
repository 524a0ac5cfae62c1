"""Recordings of a synthesised source stored in a folder: made once, by all cores, then read.

A folder holds `description.json`, a WAV file (16 bit, 16 kHz) for every example, and
`manifest.jsonl`, which `jsonl:` reads; both can be used elsewhere. Each part of 256 examples is
synthesised by its own process, from a fresh state of espeak-ng, so the bytes depend neither on the
number of cores nor on interruptions. A part's list of examples appears when its recordings are
complete, so an interrupted run continues with the missing parts. Nothing is resampled when the
recordings are read, and their lengths are known.
"""

import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int16

from cwcl_jax.copies import disk_home
from cwcl_jax.data.audio import resample
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources.base import Example, SameExamples, Source
from cwcl_jax.files import locked, replacing
from cwcl_jax.progress import beat

RATE = 16_000
_SHARD = 256
_VERSION = 3  # 1: bytes were not reproducible; 2: 256 examples in one file
_AUDIBLE = 30  # of 32767


class Recorded(SameExamples):
    """The examples of a synthesised source, with recordings from `folder`.

    Opening it costs nothing: missing recordings are synthesised when a recording or a length is
    first needed.
    """

    def __init__(self, source: Source, folder: str | Path):
        super().__init__(source)
        self.folder = Path(folder)
        self._lock = threading.Lock()

    def read(self, index: int, fields: Collection[str]) -> Example:
        if "audio" not in fields:
            return self.source.read(index, fields)
        example = self.source.read(index, {*fields} - {"audio"})
        if not self.durations[index]:
            raise BadExample("audio empty", f"{example['id']} could not be synthesised")
        with wave.open(str(_recording(self.folder, index))) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        example["audio"] = (samples.astype(np.int16), RATE)
        return example

    @functools.cached_property
    def durations(self) -> Float64[np.ndarray, " n"]:
        """Seconds of every recording, 0 if there is none; missing recordings are made first."""
        with self._lock:
            record(self.source, self.folder)
            lists = _lists(self.folder, len(self.source))
            return np.asarray([row["duration"] for path in lists for row in _rows(path)])

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "durations")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def default_folder(source: Source, cache_dir: str) -> Path:
    """Returns the folder of recordings if none is named: under the source's fingerprint."""
    return disk_home(cache_dir) / "recordings" / f"{source.fingerprint()}-{_VERSION}"


def record(source: Source, folder: Path, *, processes: int = 0) -> None:
    """Synthesises what `folder` lacks, in several processes; other callers on this machine wait.

    Raises:
      ValueError: the folder holds the recordings of another source, or synthesis is impossible: no
          such voice, no espeak-ng.
      RuntimeError: a process failed in another way; its message is included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_description(source, folder)
    manifest = folder / "manifest.jsonl"
    if manifest.exists() and not _missing(folder, len(source)):
        return
    with locked(folder / "lock", waiting=beat):
        missing = _missing(folder, len(source))
        if missing:
            usable = getattr(os, "sched_getaffinity", None)
            cores = len(usable(0)) if usable else os.cpu_count() or 1
            _record_in_processes(source, folder, missing, processes or min(cores, len(missing)))
        spoken = [row for path in _lists(folder, len(source)) for row in _rows(path)]
        lines = [json.dumps(row) + "\n" for row in spoken if row["duration"]]
        with replacing(manifest) as partial:
            partial.write_text("".join(lines), encoding="utf-8")


def _check_description(source: Source, folder: Path) -> None:
    file = folder / "description.json"
    mine = {"version": _VERSION, "source": source.fingerprint(), "count": len(source)}
    if not file.exists():
        with replacing(file) as partial:
            partial.write_text(json.dumps(mine | {"sample_rate": RATE}, indent=1))
        return
    there = json.loads(file.read_text())
    if any(there.get(name) != value for name, value in mine.items()):
        raise ValueError(
            f"{folder} holds recordings of another source or version ({_told(there)}, wanted "
            f"{_told(mine)}); name another folder in keep=, or delete this one."
        )


def _told(description: dict[str, Any]) -> str:
    return "{count} examples of {source}, version {version}".format_map(
        {name: description.get(name) for name in ("count", "source", "version")}
    )


def _lists(folder: Path, count: int) -> list[Path]:
    return [folder / "parts" / f"{shard:05d}.jsonl" for shard in range(-(-count // _SHARD))]


def _missing(folder: Path, count: int) -> list[int]:
    return [shard for shard, path in enumerate(_lists(folder, count)) if not path.exists()]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _recording(folder: Path, index: int) -> Path:
    return folder / "audio" / f"{index:08d}.wav"


def _record_in_processes(source: Source, folder: Path, shards: list[int], count: int) -> None:
    """Distributes the parts over workers without jax, which fork a process for each part."""
    # Workers import this same package, even if it is not installed.
    paths = [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "cwcl_jax.data.sources.recorded"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C in a terminal reaches only this process, which ends the workers
            process_group=0,
        )
        for _ in range(count)
    ]
    try:
        for number, worker in enumerate(workers):
            assert worker.stdin is not None
            pickle.dump((source, folder, shards[number::count]), worker.stdin)
            # stdin stays open: when it ends, workers know that this process is gone
            worker.stdin.flush()
        _watch(workers, folder, len(source), len(shards))
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)  # including the fork that synthesises
            worker.communicate()


def _watch(workers: list[subprocess.Popen], folder: Path, count: int, wanted: int) -> None:
    start, shown = time.perf_counter(), 0.0
    total, done = min(count, wanted * _SHARD), 0
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
        before, done = done, (wanted - len(_missing(folder, count))) * _SHARD
        if done > before:
            beat()
        if sys.stderr.isatty() and time.perf_counter() - shown > 1:
            shown = time.perf_counter()
            rate = done / (shown - start)
            print(f"\rsynthesised {done}/{total}, {rate:.0f}/s", end="", file=sys.stderr)
        if any(worker.returncode for worker in workers):
            break
    for worker in workers:
        if worker.returncode:
            lines = worker.communicate()[1].decode(errors="replace").strip().splitlines()
            message = lines[-1] if lines else str(worker.returncode)
            # A restart cannot repair settings: a run's exit code distinguishes them by this type.
            settings = message.startswith(("ValueError:", "cwcl_jax.packages.MissingPackage:"))
            raise (ValueError if settings else RuntimeError)(f"synthesis failed: {message}")
    seconds = time.perf_counter() - start
    end = "\r" if sys.stderr.isatty() else ""
    print(
        f"{end}{total} sentences synthesised in {seconds:.0f} s, stored in {folder}",
        file=sys.stderr,
        flush=True,
    )


def speak_shards(source: Source, folder: Path, shards: Sequence[int]) -> None:
    """Writes some parts of a folder, each in a fork that has not synthesised before.

    When the standard input ends, the parent is gone, and this process ends its process group.
    """
    context = multiprocessing.get_context("fork")
    asked = sys.stdin.fileno()
    for shard in shards:
        process = context.Process(target=speak_shard, args=(source, folder, shard))
        process.start()
        if asked in multiprocessing.connection.wait([process.sentinel, asked]):
            os.killpg(0, signal.SIGKILL)
        process.join()
        if process.exitcode:
            sys.exit(1)  # the fork wrote its message to the standard error


def speak_shard(source: Source, folder: Path, shard: int) -> None:
    """Writes the recordings of one part of a folder, and then their list."""
    path = _lists(folder, len(source))[shard]
    for parent in (path.parent, folder / "audio"):
        parent.mkdir(exist_ok=True)
    indices = range(shard * _SHARD, min(len(source), (shard + 1) * _SHARD))
    rows = [_speak(source, index, _recording(folder, index)) for index in indices]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _speak(source: Source, index: int, path: Path) -> dict[str, Any]:
    """Writes a recording; returns its row of the manifest, with duration 0 if synthesis fails."""
    try:
        example = source.read(index, ("text", "label", "audio"))
        spoken, rate = example["audio"]
        samples = without_silence(resample(spoken, rate, RATE))
    except BadExample:
        return {"duration": 0.0}
    if not len(samples):
        return {"duration": 0.0}
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
    row = {"id": example["id"], "audio": f"audio/{path.name}", "text": example.get("text")}
    if "label" in example:  # manifests contain names of classes, if there are any
        names = source.class_names
        row["label"] = example["label"] if names is None else names[example["label"]]
    return row | {"duration": len(samples) / RATE}


def without_silence(samples: Int16[np.ndarray, " n"]) -> Int16[np.ndarray, " m"]:
    """Returns the recording without silence, up to a twentieth of a second around the speech.

    espeak-ng ends a sentence with up to 0.3 s of silence, a seventh of what a step would compute.
    """
    heard = np.flatnonzero(np.abs(samples.astype(np.int32)) > _AUDIBLE)
    if not len(heard):
        return samples[:0]
    return samples[max(0, heard[0] - RATE // 20) : heard[-1] + RATE // 20]


if __name__ == "__main__":
    speak_shards(*pickle.load(sys.stdin.buffer))
