"""The same pictures from several kinds of files: `python -m cwcl_jax.benchmarks.formats`.

Writes pictures of a usual web size, each with a caption, as tars, as Parquet files with row groups
of several sizes, and as `datasets` saves them. Two rates each, in random order: rows of encoded
bytes out of the source, and training batches with everything that is done to a picture.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cwcl_jax.benchmarks.input import Rate, make_shards, rate_pipeline, reading
from cwcl_jax.data.pipeline import reader_threads
from cwcl_jax.data.sources import Source, open_source

_FILES = 4
_MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_formats(folder: Path, count: int, distinct: int) -> dict[str, str]:
    """Writes `count` pictures in every format; returns the source lines by what they are."""
    per_file = count // _FILES
    images = make_shards(folder, _FILES, per_file, distinct)
    tars = f"tars:{folder}/{{00000..{_FILES - 1:05d}}}.tar"
    parts = []
    for first in range(0, count, per_file):
        numbers = range(first, first + per_file)
        pictures = [{"bytes": images[n % len(images)], "path": None} for n in numbers]
        texts = [f"a picture number {n - first}" for n in numbers]
        parts.append(pa.table({"image": pa.array(pictures, _MEDIA), "text": texts}))
    lines = {"tars": tars}
    for rows in (10, 100, per_file):
        where = folder / f"groups-{rows}"
        where.mkdir()
        for number, part in enumerate(parts):
            pq.write_table(part, where / f"{number:05d}.parquet", row_group_size=rows)
        lines[f"parquet, row groups of {rows}, all in memory"] = f"parquet:{where}"
        lines[f"parquet, row groups of {rows}, memory_mib=1"] = f"parquet:{where}?memory_mib=1"
    lines["parquet, unpacked by keep="] = f"parquet:{where}?keep={folder}/kept"
    lines["hf (save_to_disk)"] = f"hf:{_write_saved(folder / 'saved', parts)}"
    return lines


def _write_saved(folder: Path, parts: list[pa.Table]) -> Path:
    """The files of `Dataset.save_to_disk`, in record batches of 1,000 rows as it writes them."""
    folder.mkdir()
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.ipc.new_stream(str(folder / name), part.schema) as writer:
            writer.write_table(part, max_chunksize=1000)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    features = {"image": {"_type": "Image"}, "text": {"_type": "Value", "dtype": "string"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


def rate_rows(source: Source, seconds: float, threads: int) -> Rate:
    """Rows a second, picture and caption, in random order."""
    order = np.random.default_rng(0).permutation(len(source))
    begin, cpu = time.perf_counter(), time.process_time()

    def work(first: int) -> int:
        done = 0
        while not done or time.perf_counter() - begin < seconds:
            source.read(int(order[(first + done * threads) % len(order)]), ("image", "text"))
            done += 1
        return done

    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    used = time.process_time() - cpu
    return Rate(done / (time.perf_counter() - begin), 1000 * used / done)


def measure(lines: dict[str, str], options: argparse.Namespace, threads: int) -> dict[str, list]:
    """Rates of rows and of batches by format; the formats alternate."""
    sources = {what: open_source(line) for what, line in lines.items()}
    found: dict[str, list[tuple[Rate, Rate]]] = {what: [] for what in lines}
    for source in sources.values():  # fills memory and caches, unpacks
        rate_rows(source, options.seconds, threads)
    for _ in range(options.rounds):
        for what, line in lines.items():
            rows = rate_rows(sources[what], options.seconds, threads)
            config = reading(line, threads)
            found[what].append((rows, rate_pipeline(config, options.seconds, options.batch)))
    return found


def print_table(found: dict[str, list[tuple[Rate, Rate]]]) -> None:
    """Medians over the rounds, processor time in brackets."""
    print("| source | rows/s (processor us a row) | images/s in batches (processor ms an image) |")
    print("|---|---|---|")
    for what, rounds in found.items():
        row, image = (
            Rate(*(statistics.median(values) for values in zip(*rates, strict=True)))
            for rates in zip(*rounds, strict=True)
        )
        told = f"{row.per_second:,.0f} ({1000 * row.cpu_ms:.0f})"
        print(f"| {what} | {told} | {image.per_second:,.0f} ({image.cpu_ms:.2f}) |")


def main() -> None:
    """Prints a table of the formats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=200, help="different ones among them")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--threads", type=int, default=0, help="0 = one for each usable core")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="formats alternate; medians count")
    options = parser.parse_args()
    threads = reader_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        lines = write_formats(Path(name), options.pictures, options.distinct)
        print(f"{options.pictures} pictures, {threads} threads, medians of {options.rounds} rounds")
        print_table(measure(lines, options, threads))


if __name__ == "__main__":
    main()
