"""How fast input is read: `python -m cwcl_jax.benchmarks.input`.

Makes tars of JPEGs of a usual web size and reads them as training does, to uint8 batches of 224.
Beside it stand the bare decoder (the same images from memory, nothing else) and the `webdataset`
package with the same decode, where it is installed. All use the same number of cores. Then come
rates of what is not decoded: drawn scenes, arrays, stored embeddings.
"""

import argparse
import io
import os
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import reader_threads, train_batches
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.tar_index import build_index, load_index
from cwcl_jax.modalities import ImageInputs
from cwcl_jax.modalities.image import train_pixels
from cwcl_jax.synthetic import scenes

_INPUTS = ImageInputs(size=224, crop_min_area=0.5, flip=True)


def make_jpeg(number: int, width: int = 512, height: int = 384) -> bytes:
    """A picture with edges, gradients and grain, so that its size is that of a photograph."""
    scene = scenes.draw(scenes.describe(0, 99, number), 64).resize((width, height))
    grain = np.random.default_rng(number).normal(0, 9, (height, width, 3))
    pixels = np.clip(np.asarray(scene) + grain, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    """One tar of samples: a key and the bytes of each extension."""
    with tarfile.open(path, "w") as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_shards(folder: Path, shards: int, per_shard: int, distinct: int = 200) -> list[bytes]:
    """Writes img2dataset-like tars; returns the distinct JPEGs."""
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


class Rate(NamedTuple):
    """Images per second, and processor milliseconds an image (steady on a busy machine)."""

    per_second: float
    cpu_ms: float


def rate_bare(images: list[bytes], seconds: float, threads: int) -> Rate:
    """Decoding alone."""

    def work(number: int) -> int:
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            data = images[(number + done * threads) % len(images)]
            train_pixels(data, _INPUTS, Draws(number, done))
            done += 1
        return done

    begin, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    return _rate_of(done, begin, cpu)


def _rate_of(done: int, begin: float, cpu: float) -> Rate:
    used = time.process_time() - cpu
    return Rate(done / (time.perf_counter() - begin), 1000 * used / done)


def _rate(batches: Iterator, size: int, seconds: float) -> Rate:
    for _ in range(3):  # What was prepared ahead does not count.
        next(batches)
    done, begin, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begin < seconds:
        next(batches)
        done += size
    return _rate_of(done, begin, cpu)


def reading(line: str, threads: int) -> DataConfig:
    """Settings that read a source, pictures as all of these measurements take them."""
    inputs = usual_inputs() | {"image": _INPUTS}
    return DataConfig(train=line, inputs=inputs, threads=threads)


def rate_pipeline(
    config: DataConfig, seconds: float, batch: int, modalities: Sequence[str] = ("image", "text")
) -> Rate:
    """Ready training batches, captions tokenized."""
    batches = train_batches(config, modalities, seed=0, global_batch_size=batch)
    try:
        return _rate(batches, batch, seconds)
    finally:
        batches.close()


def _decode_for_webdataset(sample: tuple[bytes, bytes]) -> tuple[np.ndarray, str]:
    data, text = sample
    return train_pixels(data, _INPUTS, Draws(len(data))), text.decode()


def rate_webdataset(paths: list[str], seconds: float, workers: int, batch: int) -> Rate | None:
    """`webdataset` with its worker processes (whose time is not ours); None where it is missing."""
    try:
        from webdataset import WebDataset, WebLoader  # pyright: ignore
    except ImportError:
        return None
    dataset = WebDataset(paths * 1000, shardshuffle=False, empty_check=False)
    dataset = dataset.shuffle(200).to_tuple("jpg", "txt").map(_decode_for_webdataset)
    loader = WebLoader(dataset.batched(batch), batch_size=None, num_workers=workers)
    return _rate(iter(loader), batch, seconds)


def time_to_index(folder: Path, samples: int = 10_000) -> float:
    """Seconds to scan a tar of this many samples for the first time."""
    path = folder / "many.tar"
    body = {"jpg": b"x" * 30_000, "txt": b"a caption", "json": b"{}"}
    write_tar(path, [(f"{number:09d}", body) for number in range(samples)])
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # Out of the page cache: the scan is a cold one.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin = time.perf_counter()
    assert len(build_index(str(path))) == samples
    return time.perf_counter() - begin


def time_to_first_batch(folder: Path, images: list[bytes], shards: int = 1000) -> float:
    """Seconds from opening this many indexed shards to the first batch of 256."""
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
    """Peak resident megabytes after each of five epochs."""
    config = reading(line, threads)
    batches = train_batches(config, ("image", "text"), seed=0, global_batch_size=64)
    peaks = []
    for _ in range(5):
        for _ in range(batches.steps_per_epoch):
            next(batches)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    batches.close()
    return peaks


def write_store(folder: Path, count: int = 20_000, width: int = 768) -> str:
    """The line of a folder with random embeddings."""
    store = folder / "store"
    description = EmbeddingDescription("image", (width,), "float16", count, "none", "none")
    writer = EmbeddingWriter(store, description)
    for rows in writer.pending():
        vectors = np.random.default_rng(rows.start).normal(size=(len(rows), width))
        writer.write(rows, [f"{number:08d}" for number in rows], vectors)
    return f"embeddings:{store}"


def _alternate(
    images: list[bytes], line: str, paths: list[str], options: Any, threads: int
) -> dict[str, list[Rate]]:
    """Rates of all kinds, round by round, so that a busy machine slows each alike."""
    rates: dict[str, list[Rate]] = {"bare": [], "pipeline": [], "webdataset": []}
    for _ in range(options.rounds):
        rates["bare"].append(rate_bare(images, options.seconds, threads))
        config = reading(line, threads)
        rates["pipeline"].append(rate_pipeline(config, options.seconds, options.batch))
        other = rate_webdataset(paths, options.seconds, threads, options.batch)
        rates["webdataset"] += [] if other is None else [other]
    return rates


def _print_rates(rates: dict[str, list[Rate]]) -> None:
    for kind, values in rates.items():
        if values:
            listed = ", ".join(f"{rate.per_second:.0f} ({rate.cpu_ms:.2f})" for rate in values)
            print(f"{kind}: images/s (processor ms an image): {listed}")
    ours = rates["pipeline"]
    for kind in ("bare", "webdataset"):
        pairs = list(zip(ours, rates[kind], strict=False))
        if pairs:
            ratio = statistics.median(a.per_second / b.per_second for a, b in pairs)
            print(f"pipeline / {kind}, rate, median of rounds: {ratio:.2f}")
    cpu = statistics.median(b.cpu_ms / a.cpu_ms for a, b in zip(ours, rates["bare"], strict=True))
    print(f"bare / pipeline, processor time, median of rounds: {cpu:.2f}")


def main() -> None:
    """Prints every figure with what it is compared to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement")
    parser.add_argument("--threads", type=int, default=0, help="0 = one for each usable core")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8, help="kinds alternate; medians count")
    options = parser.parse_args()
    threads = reader_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = make_shards(folder, shards=4, per_shard=250)
        print(f"{threads} threads, JPEG 512x384, {np.mean([len(i) for i in images]) / 1024:.0f} KB")
        line = f"tars:{folder}/{{00000..00003}}.tar"
        paths = [str(path) for path in sorted(folder.glob("0*.tar"))]
        open_source(line)
        _print_rates(_alternate(images, line, paths, options, threads))
        made = {
            "embedded scenes at 64": (DataConfig(threads=threads), 128, ("image", "text")),
            "two arrays, 64 and 96 wide": (reading("made:train", threads), 1024, ("u", "v")),
            "stored vectors, 768 wide": (reading(write_store(folder), threads), 1024, ("image",)),
        }
        for what, (config, batch, modalities) in made.items():
            rate = rate_pipeline(config, options.seconds, batch, modalities)
            print(f"{what}: {rate.per_second:.0f} examples/s")
        print(f"peak memory over epochs: {memory_over_epochs(line, threads)} MB")
        print(f"index of 10,000 samples, cold: {time_to_index(folder):.2f} s")
        print(f"1,000 indexed shards to first batch: {time_to_first_batch(folder, images):.2f} s")


if __name__ == "__main__":
    main()
