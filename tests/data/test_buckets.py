"""Batches by length: every example once, few shapes, the same on any number of hosts."""

import numpy as np
import pytest

from cwcl_jax.data.buckets import BucketedOrder
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.order import GlobalOrder
from cwcl_jax.data.pipeline import TrainBatches, eval_batches
from cwcl_jax.data.sources.base import Source
from cwcl_jax.modalities import SpeechInputs

SPEECH = SpeechInputs(max_seconds=0.4, buckets=(0.1, 0.2), bucket_window=3, random_crop=False)
CONFIG = DataConfig(train="memory", inputs={"speech": SPEECH}, threads=2)


class Waves(Source):
    """Recordings whose first sample is their number."""

    def __init__(self, count=50, known=True):
        rng = np.random.default_rng(0)
        self.lengths = rng.integers(400, 8000, count)  # 25 ms to 0.5 s
        self.known = known

    def __len__(self):
        return len(self.lengths)

    @property
    def durations(self):
        return self.lengths / 16_000 if self.known else None

    def read(self, index, fields):
        wave = np.full(self.lengths[index], index + 1, np.int16)
        return {"id": str(index), "audio": (wave, 16_000)}

    def fingerprint(self):
        return "waves"


def batches(count, size=6, **more):
    made = TrainBatches(CONFIG, ("speech",), seed=3, global_batch_size=size, source=Waves(), **more)
    try:
        return [next(made) for _ in range(count)], made
    finally:
        made.close()


def test_an_epoch_has_every_example_once_in_batches_of_similar_length():
    order = GlobalOrder((100,), (100.0,), 100, seed=1)
    durations = np.random.default_rng(0).uniform(0.1, 3, 100)
    made = BucketedOrder(
        order, durations, lengths=(1.0, 2.0, 3.0), batch_size=5, window=8, steps=20
    )
    found = [made.batch(0, step) for step in range(20)]
    indices = np.stack([i for i, _ in found])
    assert sorted(indices.ravel()) == list(range(100))
    spread = np.ptp(durations[indices], axis=1).mean()
    assert spread < 0.5 * np.ptp(durations[:100].reshape(20, 5), axis=1).mean()
    for chosen, seconds in found:
        assert durations[chosen].max() <= seconds
        assert seconds == 1.0 or durations[chosen].max() > seconds - 1.0
    # Short batches do not all come first.
    means = durations[indices[:8]].mean(axis=1)
    assert not np.all(np.diff(means) > 0)
    assert not np.array_equal(made.batch(1, 0)[0], made.batch(0, 0)[0])


def test_waveforms_have_few_lengths_and_lose_nothing_that_fits():
    made, source = batches(8)[0], Waves()
    shapes = {batch["speech"]["waveform"].shape for batch in made}
    assert shapes <= {(6, 1600), (6, 3200), (6, 6400)}
    assert len(shapes) > 1
    for batch in made:
        expected = np.minimum(source.lengths[batch["index"]], batch["speech"]["waveform"].shape[1])
        np.testing.assert_array_equal(batch["speech"]["length"], expected)
        np.testing.assert_array_equal(batch["speech"]["waveform"][:, 0], batch["index"] + 1)
        assert np.all((expected == source.lengths[batch["index"]]) | (expected == 6400))


def test_hosts_share_shapes_and_the_order_does_not_depend_on_their_number():
    alone, _ = batches(8)
    hosts = [batches(8, process_index=h, process_count=2)[0] for h in (0, 1)]
    for step, whole in enumerate(alone):
        parts = [host[step] for host in hosts]
        assert len({part["speech"]["waveform"].shape for part in parts}) == 1
        joined = np.concatenate([part["speech"]["waveform"] for part in parts])
        np.testing.assert_array_equal(joined, whole["speech"]["waveform"])


def test_the_order_continues_exactly_from_a_state():
    whole, made = batches(20)  # beyond one epoch of 8 batches
    made.set_state({"step": 11})
    again = next(made)
    made.close()
    np.testing.assert_array_equal(again["index"], whole[11]["index"])
    np.testing.assert_array_equal(again["speech"]["waveform"], whole[11]["speech"]["waveform"])
    assert made.fingerprint()["inputs"]["speech"]["buckets"] == (0.1, 0.2)


def test_a_source_without_lengths_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"data\.speech\.buckets=\(\)"):
        TrainBatches(CONFIG, ("speech",), seed=0, global_batch_size=4, source=Waves(known=False))


def test_evaluation_batches_are_as_long_as_they_need():
    source = Waves(10)
    source.lengths[:5] = 1000
    made = list(eval_batches(source, CONFIG, ("speech",), batch_size=5))
    trimmed = [SPEECH.trim(b["speech"])["waveform"] for b in made]
    assert [waveform.shape[1] for waveform in trimmed] == [1600, 6400]
    for batch, waveform in zip(made, trimmed, strict=True):
        assert not batch["speech"]["waveform"][:, waveform.shape[1] :].any()


def test_lengths_are_the_buckets_below_the_largest_and_that():
    inputs = SpeechInputs(buckets=(2.0, 1.0, 9.0), max_seconds=3.0)
    assert inputs.lengths == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="positive seconds"):
        SpeechInputs(buckets=(0.0,))
