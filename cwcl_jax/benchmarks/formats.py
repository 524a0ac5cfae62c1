"""Reads the same pictures from several file formats: `python -m cwcl_jax.benchmarks.formats`.

Writes pictures of a usual web size, each with a caption, as tars, as Parquet files with row groups
of several sizes, and as `datasets` saves them. Measures two rates for each, in random order: rows
of encoded bytes read from the source, and training batches with all processing of the pictures.
Writes formats.md and formats.json; `ratio` is a rate relative to that of tars in the same round
(median).
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cwcl_jax import cli
from cwcl_jax.benchmarks import harness
from cwcl_jax.benchmarks.harness import Rate, Row, interleaved, rate, rate_rows
from cwcl_jax.benchmarks.input import make_shards, rate_pipeline, reading, tars
from cwcl_jax.config import ConfigError
from cwcl_jax.data.pipeline import reader_threads
from cwcl_jax.data.sources import Source, open_source

_FILES = 4
_MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_formats(folder: Path, count: int, distinct: int) -> dict[str, str]:
    """Writes `count` pictures in every format; returns the source lines by format."""
    per_file = count // _FILES
    images = make_shards(folder, _FILES, per_file, distinct)
    parts = []
    for first in range(0, count, per_file):
        numbers = range(first, first + per_file)
        pictures = [{"bytes": images[n % len(images)], "path": None} for n in numbers]
        texts = [f"a picture number {n - first}" for n in numbers]
        parts.append(pa.table({"image": pa.array(pictures, _MEDIA), "text": texts}))
    lines = {"tars": tars(folder, _FILES)}
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
    """Writes the files of `Dataset.save_to_disk`, in batches of 1,000 rows; returns the folder."""
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


def rate_rows_of(source: Source, seconds: float, threads: int) -> Rate:
    """Returns the rate of rows with picture and caption, read in random order."""
    order = np.random.default_rng(0).permutation(len(source))

    def read(number: int) -> int:
        source.read(int(order[number % len(order)]), ("image", "text"))
        return 1

    return rate(read, seconds, threads)


def measure(
    lines: dict[str, str], options: argparse.Namespace, threads: int
) -> dict[str, list[Row]]:
    """Returns the rates of rows and of batches by format; the formats alternate."""
    sources = {what: open_source(line) for what, line in lines.items()}
    for source in sources.values():  # fills memory and caches, and unpacks
        rate_rows_of(source, options.seconds, threads)
    rows = {
        what: partial(rate_rows_of, source, options.seconds, threads)
        for what, source in sources.items()
    }
    batches = {
        what: partial(rate_pipeline, reading(line, threads), options.seconds, options.batch)
        for what, line in lines.items()
    }
    first = next(iter(lines))
    return {
        "rows": rate_rows(interleaved(rows, rounds=options.rounds), first),
        "pictures in batches": rate_rows(interleaved(batches, rounds=options.rounds), first),
    }


def _define(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", type=cli.at_least(_FILES), default=2000, help="pictures per format"
    )
    about = "number of different pictures"
    parser.add_argument("--distinct", type=cli.at_least(1), default=200, help=about)
    harness.define_rates(parser, "formats", rounds=5)


@cli.command(_define)
def main(options: argparse.Namespace) -> None:
    """Measures the formats."""
    threads = reader_threads(options.threads)
    if options.pictures < options.batch:
        raise ConfigError(f"--pictures={options.pictures}: fewer than a batch, {options.batch}")
    with tempfile.TemporaryDirectory() as name:
        lines = write_formats(Path(name), options.pictures, options.distinct)
        print(f"{options.pictures} pictures, {threads} threads, medians of {options.rounds} rounds")
        tables = measure(lines, options, threads)
    harness.report(options.output, "formats", tables, dict.fromkeys(tables, harness.RATES))


if __name__ == "__main__":
    sys.exit(main())
