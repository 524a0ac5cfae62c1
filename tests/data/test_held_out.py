"""A share that is held out is the same everywhere and never trained on."""

from __future__ import annotations

import numpy as np
import pytest

from cwcl_jax.data.cuts import counting_cuts
from cwcl_jax.data.held_out import hold_out, shared_with_neighbours
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.overlap import shared_examples
from cwcl_jax.data.pipeline import order_of_source, train_batches
from cwcl_jax.data.sources import Mixture, Source
from cwcl_jax.data.sources.base import columns_taken
from cwcl_jax.data.sources.beside import Beside
from cwcl_jax.modalities.text import TextInputs


class Numbers(Source):
    """Examples that are their own numbers; each stands `copies` times in a row."""

    def __init__(self, length, *, copies=1, name="numbers"):
        self.length, self.copies, self.name = length, copies, name
        self.durations = np.arange(length, dtype=float)

    def __len__(self):
        return self.length

    def read(self, index, fields):
        number = index // self.copies
        captions = [f"number {number}", "another caption of it"]
        return {"id": f"{self.name}-{index}", "image": bytes([number % 250]), "text": captions}

    def vectors(self, indices):
        return {"features": indices.astype(np.float32)[:, None]}

    def fingerprint(self):
        return f"{self.name} {self.length} {self.copies}"


def ids(source):
    return [source.read(index, ())["id"] for index in range(len(source))]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_both_sides_are_the_whole_without_an_overlap(share):
    source = Numbers(701)
    kept, held = hold_out(source, share, 5)
    assert len(held) == round(share * 701)
    assert sorted(ids(kept) + ids(held)) == sorted(ids(source))
    left_out = {*ids(held)}
    assert ids(kept) == [name for name in ids(source) if name not in left_out]


def test_which_examples_are_held_out_follows_from_seed_and_share():
    source = Numbers(500)
    assert ids(hold_out(source, 0.1, 5)[1]) == ids(hold_out(Numbers(500), 0.1, 5)[1])
    assert ids(hold_out(source, 0.1, 6)[1]) != ids(hold_out(source, 0.1, 5)[1])
    prints = {part.fingerprint() for seed in (5, 6) for part in hold_out(source, 0.1, seed)}
    assert len({*prints, source.fingerprint()}) == 5


def test_lengths_and_vectors_are_those_of_the_examples():
    for part in hold_out(Numbers(90), 0.2, 1):
        numbers = np.array([int(name.split("-")[1]) for name in ids(part)])
        np.testing.assert_array_equal(part.durations, numbers)
        places = np.array([7, 0, 3])
        np.testing.assert_array_equal(part.vectors(places)["features"][:, 0], numbers[places])


def test_features_beside_a_mixture_leave_it_its_parts(tmp_path):
    """Such as those of a user's kind of source that returns a mixture, or of `spoken:`."""
    parts = [Numbers(100, name="a"), Numbers(300, name="b")]
    parts[0].taken = {"image": "picture"}
    np.save(tmp_path / "rows.npy", np.arange(800.0).reshape(400, 2))
    source = Beside(Mixture(parts, [3.0, 1.0]), "guide", str(tmp_path / "rows.npy"))
    assert [ids(part) for part in source.parts] == [ids(part) for part in parts]
    assert source.parts[1].read(7, {"features"})["features"]["guide"].tolist() == [214, 215]
    assert columns_taken(source) == ["image from picture"]
    order = order_of_source(source, 400, per_epoch=0, seed=0, shuffle=True)
    assert order.quotas == (300, 100)
    held = hold_out(source, 0.1, 2)[1]
    assert [len(part) for part in held.parts] == [10, 30]
    assert held.weights == [3.0, 1.0]
    assert {*held.read(0, {"features"})["features"]} == {"guide"}
    assert shared_examples(source, parts[1], ("image",)).startswith("its source is (a part of)")


def test_each_part_of_a_mixture_gives_its_share():
    mixture = Mixture([Numbers(100, name="a"), Numbers(300, name="b")], [3.0, 1.0])
    kept, held = hold_out(mixture, 0.1, 2)
    assert [len(part) for part in held.parts] == [10, 30]
    assert kept.weights == held.weights == [3.0, 1.0]
    assert not {*ids(kept)} & {*ids(held)}


@pytest.mark.parametrize(("length", "share"), [(10, 0.01), (10, 0.99)])
def test_a_share_that_leaves_a_side_empty_is_refused(length, share):
    with pytest.raises(ValueError, match=r"of 10 examples holds out (0|10)"):
        hold_out(Numbers(length), share, 0)


def test_a_hundred_million_examples_cost_their_held_out_numbers():
    kept, held = hold_out(Long(), 1e-4, 0)
    assert len(held) == 10_000
    places = np.array([0, len(kept) // 2, len(kept) - 1])
    assert not np.isin(kept.number_of(places), held.number_of(np.arange(len(held)))).any()


class Long(Source):
    def __len__(self):
        return 100_000_000

    def fingerprint(self):
        return "long"


def test_rows_of_one_picture_beside_each_other_are_told():
    told = shared_with_neighbours(hold_out(Numbers(400, copies=5), 0.1, 0)[1], {"image"})
    assert "validation examples have the same image as a training example next to them" in told
    assert shared_with_neighbours(hold_out(Numbers(400), 0.1, 0)[1], {"image"}) == ""


CONFIG = DataConfig(train="numbers:", threads=1)


def batches(source, *, hosts=1, host=0, random=False):
    return train_batches(
        CONFIG, ["text"], seed=3, global_batch_size=8,
        process_index=host, process_count=hosts, source=source, random=random,
    )  # fmt: skip


def first(made, count):
    found = [next(made) for _ in range(count)]
    made.close()
    return found


def test_validation_batches_are_those_of_any_number_of_hosts_and_of_any_time():
    held = hold_out(Numbers(300), 0.2, 3)[1]
    one = batches(held)
    whole = first(one, 3)
    one.set_state({"step": 0})
    again = first(one, 3)
    halves = [first(batches(held, hosts=2, host=host), 3) for host in (0, 1)]
    for step in range(3):
        expected = whole[step]["index"]
        joined = np.concatenate([half[step]["index"] for half in halves])
        np.testing.assert_array_equal(joined, expected)
        np.testing.assert_array_equal(again[step]["index"], expected)
        np.testing.assert_array_equal(again[step]["text"]["tokens"], whole[step]["text"]["tokens"])


def test_without_random_draws_the_first_caption_is_taken():
    tokenizer = CONFIG.inputs_of("text").loaded
    for batch in first(batches(Numbers(40)), 2):
        wanted = tokenizer([f"number {number}" for number in batch["index"]])
        np.testing.assert_array_equal(batch["text"]["tokens"], wanted["tokens"])
    drawn = np.concatenate(
        [b["text"]["tokens"] for b in first(batches(Numbers(40), random=True), 2)]
    )
    assert len(np.unique(drawn, axis=0)) < 16  # some are the caption that all have


def test_tokens_that_are_cut_are_counted_where_someone_asks():
    long, short = "a red circle " * 5, "a red circle"
    whole = TextInputs(max_tokens=64).loaded([long])["mask"].sum() - 2  # without the special two
    inputs = TextInputs(max_tokens=8)
    counted = []
    with counting_cuts(counted.append):
        inputs.finish([long, short, long])
    inputs.finish([long])
    assert counted == [2 * (whole - 6)]
