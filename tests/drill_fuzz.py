"""Damages files of all kinds and reads them: run by hand.

    python -m tests.drill_fuzz --count=100 --seed=0

Of each kind `count` files: a flipped bit, a zeroed or repeated block, or the end cut off. A file is
read whole, or it is one error that the command line shows in one line; no other exception, no hang,
and less than 1 GB of memory over the start.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cwcl_jax.config import ConfigError
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.data.sources import open_source
from cwcl_jax.modalities import ImageInputs, SpeechInputs
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.workdir import read_record
from cwcl_jax.weights.readers import open_weights
from tests.data.making import jpeg, pairs, sound, write_tar
from tests.pretrained.test_damaged_files import changed, write

# What a command ends with in one line, or an example is skipped for.
TOLD = (ValueError, ConfigError, FileNotFoundError, BadExample)
SECONDS = 30  # for one file
WEIGHTS = (".safetensors", ".npz", ".msgpack", ".pt", ".index.json")


def read_weights(path: Path) -> None:
    """All arrays of a weights file."""
    weights = open_weights(path)
    for name in weights.entries:
        weights.read(name)


def read_source(line: str) -> Callable[[Path], None]:
    """All examples of a source of this line; `{}` stands for the file."""

    def read(path: Path) -> None:
        source = open_source(line.format(path), cache_dir=str(path.parent / "cache"))
        for index in range(len(source)):
            with contextlib.suppress(BadExample):  # skipped and counted: the others are read
                example = source[index]
                if isinstance(example.get("image"), bytes):
                    ImageInputs(size=16).prepare(example["image"])

    return read


def table() -> bytes:
    """A Parquet file of a few rows."""
    file = io.BytesIO()
    rows = {"text": [f"caption {n}" for n in range(40)], "image": [jpeg(n % 4) for n in range(40)]}
    pq.write_table(pa.table(rows), file)
    return file.getvalue()


def arrays() -> bytes:
    """A .npz file of features."""
    file = io.BytesIO()
    rng = np.random.default_rng(0)
    np.savez(file, u=rng.normal(size=(30, 8)), v=rng.normal(size=(30, 6)), label=np.arange(30) % 3)
    return file.getvalue()


def kinds(folder: Path) -> dict[str, tuple[str, bytes, Callable[[Path], None]]]:
    """Kind -> ending, whole content, and what reads it."""
    write_tar(folder / "whole.tar", pairs(8))
    rows = [{"text": f"caption {n}", "image": f"{n}.jpg", "label": n % 3} for n in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    csv = "filepath,title\n" + "".join(f'{n}.jpg,"caption, {n}"\n' for n in range(40))
    weights = {f"weights {e}": (e, write(folder, e).read_bytes(), read_weights) for e in WEIGHTS}
    return weights | {
        "tar": (".tar", (folder / "whole.tar").read_bytes(), read_source("tars:{}")),
        "manifest": (".jsonl", lines, read_source("jsonl:{}")),
        "table": (".csv", csv.encode(), read_source("csv:{}")),
        "parquet": (".parquet", table(), read_source("parquet:{}")),
        "features": (".npz", arrays(), read_source("arrays:{}")),
        "metrics": (".jsonl", lines, read_json_lines),
        "record": (".json", json.dumps({"a": rows}).encode(), read_record),
        "wav": (".wav", sound("WAV"), lambda p: decode(SpeechInputs(), p)),
        "flac": (".flac", sound("FLAC"), lambda p: decode(SpeechInputs(), p)),
        "jpeg": (".jpg", jpeg(1), lambda p: decode(ImageInputs(size=16), p)),
    }


def decode(inputs: ImageInputs | SpeechInputs, path: Path) -> None:
    """One file as an example of a tower."""
    inputs.prepare(path.read_bytes())


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    """Reads `count` damaged files of each kind; prints the traceback of an error that is not told.

    Returns how many there were of each outcome: read, the error's type, or "not told".
    """
    rng, outcomes = np.random.default_rng(seed), Counter[str]()
    for kind, (ending, whole, read) in kinds(folder).items():
        places = folder / kind.replace(" ", "")
        places.mkdir()
        slowest, found = 0.0, Counter[str]()
        for number in range(count):
            path = places / f"{number}{ending}"
            path.write_bytes(changed(whole, rng))
            if ending == ".index.json":
                (places / "part.safetensors").write_bytes(
                    (folder / "part.safetensors").read_bytes()
                )
            start = time.monotonic()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                read(path)
                found["read"] += 1
            except TOLD as error:
                found[type(error).__name__] += 1
            except Exception:
                print(f"{kind} {number}: an error that is not told", flush=True)
                traceback.print_exc()
                found["not told"] += 1
            finally:
                faulthandler.cancel_dump_traceback_later()
            slowest = max(slowest, time.monotonic() - start)
        told = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
        print(f"{kind}: {told}; slowest {slowest:.2f} s", flush=True)
        outcomes.update(found)
    return outcomes


def main() -> None:
    """Runs the drill in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fuzz(Path(folder), arguments.count, arguments.seed)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    print(f"{outcomes.total()} files, memory over the start {grown:.2f} GB")
    assert grown < 1, "too much memory"
    assert not outcomes["not told"], "errors that are not told"


if __name__ == "__main__":
    main()
