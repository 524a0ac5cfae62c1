"""Measures how fast input is read: `python -m cwcl_jax.benchmarks.input`.

Writes tars of JPEGs of a usual web size and reads them as training does, to uint8 batches of 224.
For comparison it measures the bare decoder (the same images from memory, nothing else) and the
`webdataset` package with the same decoding, if it is installed. All use the same number of cores.
Then it measures the rates of data that is not decoded: drawn scenes, arrays, stored embeddings.
Writes input.md and input.json; `ratio` is a rate relative to the pipeline's in the same round
(median), `cpu_ratio` the same for CPU time, which does not include webdataset's workers.
"""

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from cwcl_jax import cli
from cwcl_jax.benchmarks import harness
from cwcl_jax.benchmarks.harness import Rate, interleaved, peak_resident_bytes, rate, rate_rows
from cwcl_jax.data.draws import Draws
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import reader_threads, train_batches
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.tar_index import build_index, load_index
from cwcl_jax.modalities import FeatureInputs, ImageInputs
from cwcl_jax.modalities.image import train_pixels
from cwcl_jax.synthetic import scenes

_INPUTS = ImageInputs(size=224, crop_min_area=0.5, flip=True)


def make_jpeg(number: int, width: int = 512, height: int = 384) -> bytes:
    """Returns a JPEG with edges, gradients and grain, whose size is that of a photograph."""
    scene = scenes.draw(scenes.describe(0, 99, number), 64).resize((width, height))
    grain = np.random.default_rng(number).normal(0, 9, (height, width, 3))
    pixels = np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """Writes one tar of samples: a key and the bytes of each extension."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def tars(folder: Path, shards: int = 4) -> str:
    """Returns the source line of the files of `make_shards`."""
    return f"tars:{folder}/{{00000..{shards - 1:05d}}}.tar"


def make_shards(folder: Path, shards: int, per_shard: int, distinct: int = 200) -> list[bytes]:
    """Writes tars like img2dataset's; returns the distinct JPEGs."""
    images = [make_jpeg(number) for number in range(distinct)]
    for shard in range(shards):
        samples = []
        for number in range(per_shard):
            parts = {
                "jpg": images[(shard * per_shard + number) % distinct],
                "txt": f"a picture number {number}".encode(),
                "json": b'{"status": "success"}',
            }
            samples.append((f"{shard:05d}{number:04d}", parts))
        write_tar(folder / f"{shard:05d}.tar", samples)
    return images


def rate_bare(images: list[bytes], seconds: float, threads: int) -> Rate:
    """Returns the rate of decoding alone."""

    def decode(number: int) -> int:
        train_pixels(images[number % len(images)], _INPUTS, Draws(number))
        return 1

    return rate(decode, seconds, threads)


def _rate_of_batches(batches: Iterator, size: int, seconds: float) -> Rate:
    def take(number: int) -> int:
        del number
        next(batches)
        return size

    for _ in range(3):  # batches that were prepared ahead do not count
        next(batches)
    return rate(take, seconds)


def reading(line: str, threads: int) -> DataConfig:
    """Returns settings that read a source, with the pictures' processing of these measurements."""
    inputs = usual_inputs() | {"image": _INPUTS, "u": FeatureInputs(), "v": FeatureInputs()}
    return DataConfig(train=line, inputs=inputs, threads=threads)


def rate_pipeline(
    config: DataConfig, seconds: float, batch: int, modalities: Sequence[str] = ("image", "text")
) -> Rate:
    """Returns the rate of complete training batches, with tokenized captions."""
    batches = train_batches(config, modalities, seed=0, global_batch_size=batch)
    try:
        return _rate_of_batches(batches, batch, seconds)
    finally:
        batches.close()


def _decode_for_webdataset(sample: tuple[bytes, bytes]) -> tuple[np.ndarray, str]:
    data, text = sample
    return train_pixels(data, _INPUTS, Draws(len(data))), text.decode()


def rate_webdataset(paths: list[str], seconds: float, workers: int, batch: int) -> Rate:
    """Returns the rate of `webdataset` with its worker processes."""
    from webdataset import WebDataset, WebLoader  # pyright: ignore

    dataset = WebDataset(paths * 1000, shardshuffle=False, empty_check=False)
    dataset = dataset.shuffle(200).to_tuple("jpg", "txt").map(_decode_for_webdataset)
    loader = WebLoader(dataset.batched(batch), batch_size=None, num_workers=workers)
    return _rate_of_batches(iter(loader), batch, seconds)


def time_to_index(folder: Path, samples: int = 10_000) -> float:
    """Returns the seconds to scan a tar of this many samples for the first time."""
    path = folder / "many.tar"
    body = {"jpg": b"x" * 30_000, "txt": b"a caption", "json": b"{}"}
    write_tar(path, [(f"{number:09d}", body) for number in range(samples)])
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # drops it from the page cache, for a cold scan
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    assert len(build_index(str(path))) == samples
    return time.perf_counter() - begin


def time_to_first_batch(folder: Path, images: list[bytes], shards: int = 1000) -> float:
    """Returns the seconds from opening this many indexed shards to the first batch of 256."""
    samples = [(f"{n:06d}", {"jpg": image, "txt": b"a caption"}) for n, image in enumerate(images)]
    write_tar(folder / "first.tar", samples[:20])
    many = folder / "many"
    many.mkdir()
    for number in range(shards):
        os.link(folder / "first.tar", many / f"{number:05d}.tar")
        load_index(str(many / f"{number:05d}.tar"))
    config = reading(f"tars:{many}/{{00000..{shards - 1:05d}}}.tar", threads=0)
    begin = time.perf_counter()
    batches = train_batches(config, ("image", "text"), seed=0, global_batch_size=256)
    next(batches)
    taken = time.perf_counter() - begin
    batches.close()
    return taken


def memory_over_epochs(line: str, threads: int) -> list[float]:
    """Returns the peak resident megabytes after each of five epochs."""
    config = reading(line, threads)
    batches = train_batches(config, ("image", "text"), seed=0, global_batch_size=64)
    peaks = []
    for _ in range(5):
        for _ in range(batches.steps_per_epoch):
            next(batches)
        peaks.append(peak_resident_bytes() / 2**20)
    batches.close()
    return peaks


def write_store(folder: Path, count: int = 20_000, width: int = 768) -> str:
    """Writes a folder with random embeddings; returns its source line."""
    store = folder / "store"
    description = EmbeddingDescription("image", (width,), "float16", count, "none", "none")
    writer = EmbeddingWriter(store, description)
    for rows in writer.pending():
        vectors = np.random.default_rng(rows.start).normal(size=(len(rows), width))
        writer.write(rows, [f"{number:08d}" for number in rows], vectors)
    return f"embeddings:{store}"


def compare(
    images: list[bytes], folder: Path, options: argparse.Namespace, threads: int
) -> dict[str, list[harness.Row]]:
    """Returns two tables: pictures in tars, read in alternation, and data that is not decoded."""
    seconds, batch = options.seconds, options.batch
    config = reading(tars(folder), threads)
    kinds = {
        "pipeline": partial(rate_pipeline, config, seconds, batch),
        "bare decoder": partial(rate_bare, images, seconds, threads),
    }
    if find_spec("webdataset"):
        paths = [str(path) for path in sorted(folder.glob("0*.tar"))]
        kinds["webdataset"] = partial(rate_webdataset, paths, seconds, threads, batch)
    open_source(config.train)
    other = {
        "embedded scenes at 64": (DataConfig(threads=threads), 128, ("image", "text")),
        "two arrays, 64 and 96 wide": (reading("made:train", threads), 1024, ("u", "v")),
        "stored vectors, 768 wide": (reading(write_store(folder), threads), 1024, ("image",)),
    }
    made = {
        what: partial(rate_pipeline, config, seconds, size, modalities)
        for what, (config, size, modalities) in other.items()
    }
    return {
        "pictures": rate_rows(interleaved(kinds, rounds=options.rounds), "pipeline"),
        "not decoded": rate_rows(interleaved(made), next(iter(made))),
    }


@cli.command(partial(harness.define_rates, name="input", rounds=8))
def main(options: argparse.Namespace) -> None:
    """Measures all readers, each with its comparison."""
    threads = reader_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = make_shards(folder, shards=4, per_shard=250)
        size = np.mean([len(image) for image in images]) / 1024
        print(f"{threads} threads, JPEG 512x384, {size:.0f} KB")
        tables = compare(images, folder, options, threads)
        other = {
            "peak MB after one epoch, two, ...": memory_over_epochs(tars(folder), threads),
            "seconds to index 10,000 samples, cold": time_to_index(folder),
            "seconds from 1,000 shards to a batch": time_to_first_batch(folder, images),
        }
    tables["other"] = [{"what": what, "value": value} for what, value in other.items()]
    columns = dict.fromkeys(tables, harness.RATES) | {"other": ("what", "value")}
    harness.report(options.output, "input", tables, columns)


if __name__ == "__main__":
    sys.exit(main())
