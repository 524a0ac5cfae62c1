import io

from PIL import Image

from cwcl_jax.benchmarks import input as benchmark
from cwcl_jax.data.sources import open_source


def test_pictures_have_the_size_of_photographs():
    data = benchmark.make_jpeg(0)
    assert Image.open(io.BytesIO(data)).size == (512, 384)
    assert 25_000 < len(data) < 90_000


def test_rates_are_measured_on_real_batches(tmp_path):
    images = benchmark.make_shards(tmp_path, shards=2, per_shard=6, distinct=3)
    line = benchmark.tars(tmp_path, 2)
    assert len(open_source(line)) == 12
    stored = benchmark.reading(benchmark.write_store(tmp_path, count=20, width=8), 1)
    for rate in (
        benchmark.rate_bare(images, 0.05, 1),
        benchmark.rate_pipeline(benchmark.reading(line, 1), 0.05, 4),
        benchmark.rate_pipeline(stored, 0.05, 4, ("image",)),
        benchmark.rate_pipeline(benchmark.reading("made:test?n=40", 1), 0.05, 4, ("u", "v")),
    ):
        assert rate.per_second > 0
        assert rate.cpu_ms > 0


def test_the_index_of_a_small_tar_is_timed(tmp_path):
    assert 0 < benchmark.time_to_index(tmp_path, samples=20) < 5


def test_the_first_batch_is_timed(tmp_path):
    images = [benchmark.make_jpeg(0)] * 20
    assert 0 < benchmark.time_to_first_batch(tmp_path, images, shards=20) < 10
