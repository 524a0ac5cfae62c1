import itertools
import json
import logging
import os
import re
import time

import numpy as np
import pytest

from cwcl_jax.data.options import DataConfig, usual_inputs
from cwcl_jax.data.pipeline import TrainBatches, eval_batches, reader_threads, train_batches
from cwcl_jax.data.reader import ChunkedReader
from cwcl_jax.data.skipping import BadExample, SkipCounter, TooManyBadExamples
from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.base import Source
from cwcl_jax.modalities import ImageInputs, TextInputs
from tests.data.making import jpeg, pairs, write_tar

IMAGE_TEXT = ("image", "text")
SMALL = DataConfig(
    train="scenes:train?n=50&size=32",
    inputs={
        "image": ImageInputs(size=24, crop_min_area=0.5, flip=True),
        "text": TextInputs(max_tokens=16),
    },
    threads=2,
)


class Numbers(Source):
    """Texts that are their index; those in `bad` cannot be read."""

    def __init__(self, count: int, bad=(), captions: int = 1):
        self.count, self.bad, self.captions = count, frozenset(bad), captions

    def __len__(self):
        return self.count

    def read(self, index, fields):
        if index in self.bad:
            raise BadExample("image unreadable", "made bad")
        texts = [f"{'abcdefgh'[k]} {index}" for k in range(self.captions)]
        return {"id": str(index), "text": texts if self.captions > 1 else texts[0]}

    def fingerprint(self):
        return f"numbers {self.count}"


def _numbers(count, batch, *, bad=(), hosts=1, seed=0, captions=1, **options) -> list[TrainBatches]:
    config = DataConfig(threads=1, **options)
    return [
        TrainBatches(
            config,
            ("text",),
            seed=seed,
            global_batch_size=batch,
            process_index=host,
            process_count=hosts,
            source=Numbers(count, bad, captions),
        )
        for host in range(hosts)
    ]


def _indices(batches: TrainBatches, steps: int) -> list[list[int]]:
    taken = [next(batches)["index"].tolist() for _ in range(steps)]
    batches.close()
    return taken


def _equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        if isinstance(first[name], dict):
            _equal(first[name], second[name])
        else:
            np.testing.assert_array_equal(first[name], second[name])


def test_batches_have_the_shapes_and_types_that_towers_take():
    batches = train_batches(SMALL, IMAGE_TEXT, seed=0, global_batch_size=20)
    batch = next(batches)
    batches.close()
    assert batch["image"]["pixels"].shape == (20, 24, 24, 3)
    assert batch["image"]["pixels"].dtype == np.uint8
    assert batch["text"]["tokens"].shape == (20, 16)
    assert batch["text"]["tokens"].dtype == np.int32
    assert batch["text"]["mask"].dtype == np.bool_
    assert batch["index"].dtype == np.int64
    assert batches.steps_per_epoch == 2


def test_an_epoch_sees_every_example_at_most_once_and_epochs_differ():
    (batches,) = _numbers(53, 10)
    assert batches.steps_per_epoch == 5
    taken = _indices(batches, 10)
    first, second = taken[:5], taken[5:]
    for epoch in (first, second):
        flat = list(itertools.chain(*epoch))
        assert len(set(flat)) == 50
    assert first != second


def test_epoch_subsets_are_new_ones_without_repeats():
    (batches,) = _numbers(100, 10, examples_per_epoch=30)
    assert batches.steps_per_epoch == 3
    epochs = [set(itertools.chain(*_take(batches, 3))) for _ in range(8)]
    batches.close()
    assert all(len(epoch) == 30 for epoch in epochs)
    assert len(set.union(*epochs)) > 80


def _take(batches, steps):
    return [next(batches)["index"].tolist() for _ in range(steps)]


@pytest.mark.parametrize("hosts", [2, 3, 6])
def test_the_global_batches_do_not_depend_on_the_hosts(hosts):
    steps = 7
    whole = _indices(_numbers(40, 12)[0], steps)
    parts = [_indices(host, steps) for host in _numbers(40, 12, hosts=hosts)]
    joined = [list(itertools.chain(*(part[step] for part in parts))) for step in range(steps)]
    assert joined == whole


def test_pictures_and_captions_do_not_depend_on_hosts_or_threads():
    alone = train_batches(SMALL, IMAGE_TEXT, seed=3, global_batch_size=20)
    expected = next(alone)
    alone.close()
    for threads in (1, 4):
        config = DataConfig(**{**SMALL.__dict__, "threads": threads})
        hosts = [
            train_batches(
                config, IMAGE_TEXT, seed=3, global_batch_size=20, process_index=h, process_count=4
            )
            for h in range(4)
        ]
        parts = [next(host) for host in hosts]
        for host in hosts:
            host.close()
        pixels = np.concatenate([part["image"]["pixels"] for part in parts])
        np.testing.assert_array_equal(pixels, expected["image"]["pixels"])
        tokens = np.concatenate([part["text"]["tokens"] for part in parts])
        np.testing.assert_array_equal(tokens, expected["text"]["tokens"])


@pytest.mark.parametrize("step", [0, 1, 2, 5, 9])
def test_a_restored_iterator_continues_exactly(step):
    straight = train_batches(SMALL, IMAGE_TEXT, seed=1, global_batch_size=16)
    for _ in range(step):
        next(straight)
    state = json.loads(json.dumps(straight.get_state()))
    expected = [next(straight) for _ in range(3)]
    straight.close()
    fresh = train_batches(SMALL, IMAGE_TEXT, seed=1, global_batch_size=16)
    fresh.set_state(state)
    for batch in expected:
        _equal(next(fresh), batch)
    assert fresh.get_state()["step"] == step + 3
    # Going back is possible as well.
    fresh.set_state(state)
    _equal(next(fresh), expected[0])
    fresh.close()


def test_the_same_order_continues_on_another_number_of_hosts():
    expected = _indices(_numbers(41, 12)[0], 8)
    two = _numbers(41, 12, hosts=2)
    first = [_indices(host, 4) for host in two]
    assert [a + b for a, b in zip(*first, strict=True)] == expected[:4]
    state = two[0].get_state()
    assert state == two[1].get_state()
    three = _numbers(41, 12, hosts=3)
    for host in three:
        host.set_state(state)
    rest = [_indices(host, 4) for host in three]
    assert [a + b + c for a, b, c in zip(*rest, strict=True)] == expected[4:]


def test_captions_are_chosen_alike_whatever_happens_to_the_pictures():
    line = "scenes:train?n=50&size=32&captions=4"
    plain = DataConfig(train=line, threads=1)
    cropped = DataConfig(
        train=line,
        inputs=usual_inputs() | {"image": ImageInputs(size=24, crop_min_area=0.1)},
        threads=1,
    )
    both = [train_batches(c, IMAGE_TEXT, seed=0, global_batch_size=25) for c in (plain, cropped)]
    first, second = (next(batches)["text"]["tokens"] for batches in both)
    for batches in both:
        batches.close()
    np.testing.assert_array_equal(first, second)


def test_one_of_several_captions_is_chosen_anew_each_epoch():
    (batches,) = _numbers(16, 16, captions=4)
    chosen: dict[int, set[int]] = {index: set() for index in range(16)}
    for _ in range(12):
        batch = next(batches)
        for index, tokens in zip(batch["index"], batch["text"]["tokens"], strict=True):
            chosen[int(index)].add(int(tokens[1]))
    batches.close()
    assert min(len(letters) for letters in chosen.values()) >= 2
    assert len(set.union(*chosen.values())) == 4


BAD = (3, 17, 18, 19, 40, 77)


def test_unusable_examples_are_replaced_by_the_order_itself(caplog):
    good = _indices(_numbers(100, 10)[0], 10)
    with caplog.at_level(logging.WARNING):
        (batches,) = _numbers(100, 10, bad=BAD, max_skipped_share=0.5)
        taken = _take(batches, 10)
    # Threads read ahead: those of the next epoch may be among them.
    assert batches.skipped["image unreadable"] >= len(BAD)
    batches.close()
    replaced = 0
    for clean, used in zip(good, taken, strict=True):
        for index, other in zip(clean, used, strict=True):
            assert other not in BAD
            if index in BAD:
                replaced += 1
            else:
                assert index == other
    assert replaced == len(BAD)
    # No batch holds an example twice.
    assert all(len(set(batch)) == 10 for batch in taken)
    named = [record for record in caplog.records if "Skipped" in record.message]
    assert len(named) == 5
    assert "only counted" in named[-1].message


@pytest.mark.parametrize("hosts", [2, 5])
def test_with_bad_examples_all_hosts_make_the_same_steps(hosts):
    options = {"bad": BAD, "max_skipped_share": 0.5}
    whole = _indices(_numbers(100, 10, **options)[0], 23)
    parts = [_indices(host, 23) for host in _numbers(100, 10, hosts=hosts, **options)]
    joined = [list(itertools.chain(*(part[step] for part in parts))) for step in range(23)]
    assert joined == whole


def test_replacements_of_a_subset_come_from_outside_of_it():
    (clean,) = _numbers(100, 10, examples_per_epoch=30)
    subset = set(itertools.chain(*_indices(clean, 3)))
    bad = set(sorted(subset)[:4])
    (batches,) = _numbers(100, 10, bad=bad, examples_per_epoch=30, max_skipped_share=0.5)
    used = list(itertools.chain(*_indices(batches, 3)))
    assert len(set(used)) == 30
    assert len(set(used) - subset) == 4


def test_too_many_bad_examples_end_the_run_with_their_kinds():
    (batches,) = _numbers(1000, 10, bad=range(0, 1000, 10), max_skipped_share=0.05)
    message = r"image unreadable: \d\d.*max_skipped_share=0\.05"
    with pytest.raises(TooManyBadExamples, match=message):
        _take(batches, 100)
    batches.close()


def test_a_source_without_any_usable_example_fails_at_once():
    (batches,) = _numbers(40, 10, bad=range(40), max_skipped_share=1.0)
    with pytest.raises(RuntimeError, match="in a row were unusable"):
        next(batches)
    batches.close()


def test_the_share_counts_examples_not_attempts():
    counter = SkipCounter(0.1)
    for _ in range(10):
        counter.add_skipped("x", BadExample("text empty"))
    counter.add_read(1000)
    for _ in range(90):
        counter.add_skipped("x", BadExample("text empty"))
    assert counter.kinds == {"text empty": 100}
    assert counter.total == 100
    counter.add_read(-500)
    with pytest.raises(TooManyBadExamples):
        counter.add_skipped("x", BadExample("text empty"))


def test_whichever_thread_passes_the_limit_the_words_are_the_same():
    counter = SkipCounter(0.1)
    words = []
    for _ in range(13):
        try:
            counter.add_skipped("x", BadExample("text empty"))
        except TooManyBadExamples as error:
            words.append(str(error))
    assert len(words) == 3
    assert len(set(words)) == 1
    assert words[0].startswith("11 of the 11 examples read so far")


def test_good_examples_of_the_batch_that_passes_the_limit_are_counted_too():
    (batches,) = _numbers(60, 32, bad=range(0, 60, 2))
    with pytest.raises(TooManyBadExamples) as error:
        next(batches)
    batches.close()
    skipped, read = map(int, re.findall(r"(\d+) of the (\d+) examples read", str(error.value))[0])
    assert skipped == 11
    assert read > 11


def test_every_kind_of_damage_in_a_tar_is_skipped_and_counted(tmp_path):
    damage = [
        ("bad0.jpg", jpeg()[:100]),
        ("bad0.txt", b"truncated picture"),
        ("bad1.jpg", jpeg()),
        ("bad1.txt", b"  \n"),
        ("bad2.txt", b"no picture"),
        ("bad3.jpg", jpeg()),
        ("bad4.jpg", b""),
        ("bad4.txt", b"empty file"),
        ("bad5.jpg", jpeg(0, 300, 300)),
        ("bad5.txt", b"too large"),
    ]
    write_tar(tmp_path / "0.tar", [*pairs(40), *damage])
    write_tar(tmp_path / "1.tar", pairs(30))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    config = DataConfig(
        train=f"tars:{tmp_path}/{{0..1}}.tar",
        inputs=usual_inputs() | {"image": ImageInputs(size=16, max_pixels=50_000)},
        max_skipped_share=0.9,
        threads=2,
    )
    batches = train_batches(config, IMAGE_TEXT, seed=0, global_batch_size=2)
    assert batches.steps_per_epoch * 2 == len(batches.source)
    for _ in range(batches.steps_per_epoch):
        batch = next(batches)
        assert batch["image"]["pixels"].shape == (2, 16, 16, 3)
    batches.close()
    kinds = set(batches.skipped)
    expected = {"image unreadable", "text empty", "image missing", "text missing", "image empty"}
    assert kinds >= expected | {"image too large"}


def test_mixtures_keep_their_shares_in_every_epoch():
    line = "scenes:train?n=100&weight=3::scenes:train?n=20&seed=9&weight=1"
    config = DataConfig(train=line, examples_per_epoch=40, threads=1)
    batches = train_batches(config, ("text",), seed=0, global_batch_size=20)
    for _ in range(3):
        indices = np.concatenate([next(batches)["index"] for _ in range(2)])
        assert (indices < 100).sum() == 30
        assert len(set(indices.tolist())) == 40
    batches.close()


def test_the_fingerprint_changes_with_what_decides_the_batches():
    def made(**changes):
        options = {"seed": 0, "global_batch_size": 10}
        options_of_data = changes.pop("config", {})
        inputs = {**SMALL.inputs, **options_of_data.pop("inputs", {})}
        config = DataConfig(**{**SMALL.__dict__, **options_of_data, "inputs": inputs})
        batches = train_batches(config, IMAGE_TEXT, **{**options, **changes})
        return json.dumps(batches.fingerprint(), sort_keys=True)

    variants = [
        made(),
        made(seed=1),
        made(global_batch_size=5),
        made(config={"train": "scenes:train?n=49&size=32"}),
        made(config={"examples_per_epoch": 20}),
        made(config={"shuffle": False}),
        made(config={"inputs": {"image": ImageInputs(size=24)}}),
        made(config={"inputs": {"text": TextInputs(max_tokens=15)}}),
    ]
    assert len(set(variants)) == len(variants)
    # How it is read does not matter, nor how many hosts read it.
    assert made(config={"threads": 1, "prefetch": 5}) == variants[0]
    assert made(process_index=1, process_count=2) == variants[0]


def test_a_batch_that_cannot_be_made_is_refused_with_the_option():
    with pytest.raises(ValueError, match="3 hosts"):
        train_batches(SMALL, IMAGE_TEXT, seed=0, global_batch_size=20, process_count=3)
    with pytest.raises(ValueError, match="lower the batch size or add"):
        train_batches(SMALL, IMAGE_TEXT, seed=0, global_batch_size=51)
    too_many = DataConfig(**{**SMALL.__dict__, "examples_per_epoch": 51})
    with pytest.raises(ValueError, match="exceeds the 50"):
        train_batches(too_many, IMAGE_TEXT, seed=0, global_batch_size=5)
    with pytest.raises(ValueError, match="no inputs for 'smell'; known: image, text"):
        train_batches(SMALL, ("image", "smell"), seed=0, global_batch_size=5)


def test_waiting_is_measured():
    (batches,) = _numbers(100, 10)
    assert batches.wait_seconds == 0
    start = time.perf_counter()
    next(batches)
    assert 0 < batches.wait_seconds < time.perf_counter() - start
    batches.close()


def test_a_thread_that_comes_late_counts_nothing_for_the_next_start():
    loaded = []
    reader = ChunkedReader(
        lambda step, rows: loaded.append(step), local_size=4, steps=100, config=DataConfig()
    )
    reader.start(0)
    late = reader._opening
    reader.start(50)  # a thread of the first start has taken its number and not begun yet
    assert reader._load_chunk(late, 0) is None
    assert loaded == []
    reader._load_chunk(reader._opening, 50)
    assert loaded == [50]
    reader.close()


def test_threads_fit_the_cores(monkeypatch):
    assert 1 <= reader_threads(0) <= 16
    assert reader_threads(3) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(24), raising=False)
    assert reader_threads(0) == 16
    monkeypatch.setenv("CWCL_LOCAL_PROCESSES", "8")  # a launcher's, on a host that they share
    assert reader_threads(0) == 3


def test_evaluation_sees_everything_once_in_order():
    source = open_source("scenes:test?task=shape&n=23")
    batches = eval_batches(source, SMALL, IMAGE_TEXT, batch_size=10)
    assert len(batches) == 3
    made = list(batches)
    assert [batch["index"].tolist() for batch in made] == [
        list(range(10)),
        list(range(10, 20)),
        list(range(20, 30)),
    ]
    valid = np.concatenate([batch["valid"] for batch in made])
    assert valid.tolist() == [True] * 23 + [False] * 7
    labels = np.concatenate([batch["label"] for batch in made])
    assert labels[:23].tolist() == [source.read(i, ("label",))["label"] for i in range(23)]
    assert (labels[23:] == -1).all()
    captions = [texts for batch in made for texts in batch["captions"]]
    assert captions[:23] == [[source.read(i, ("text",))["text"]] for i in range(23)]
    ids = [name for batch in made for name in batch["id"]]
    assert ids[22] == source.read(22, ())["id"]
    assert ids[23:] == [""] * 7
    # Filling is made of usable inputs: towers see nothing they cannot take.
    assert made[2]["text"]["mask"].any(axis=1).all()
    for first, second in zip(made, batches, strict=True):
        np.testing.assert_array_equal(first["image"]["pixels"], second["image"]["pixels"])


def test_captions_of_evaluation_are_those_with_words(tmp_path):
    write_tar(
        tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.txt", b"one\n \n two \n"), ("b.jpg", jpeg())]
    )
    source = open_source(f"tars:{tmp_path}/0.tar?text=lines")
    (batch,) = eval_batches(source, DataConfig(threads=1), ("image",), batch_size=2)
    assert batch["captions"] == [["one", "two"], []]
    assert batch["valid"].all()


def test_labels_that_are_words_hinder_neither_evaluation_nor_captions(tmp_path, caplog):
    members = []
    for name, label in (("a", b"cat"), ("b", b"1"), ("c", b"dog")):
        members += [(f"{name}.jpg", jpeg()), (f"{name}.txt", b"one"), (f"{name}.cls", label)]
    write_tar(tmp_path / "0.tar", members)
    batches = eval_batches(
        f"tars:{tmp_path}/0.tar", DataConfig(threads=1), ("image",), batch_size=3
    )
    (batch,) = batches
    assert batch["valid"].all()
    assert batch["captions"] == [["one"]] * 3
    np.testing.assert_array_equal(batch["label"], [-1, 1, -1])
    assert not batches.skipped
    (record,) = caplog.records
    assert "is used without its label" in record.getMessage()
    assert "0.tar/a" in record.getMessage()


@pytest.mark.parametrize(
    ("modality", "kind"), [("image", "image unreadable"), ("text", "text missing")]
)
def test_inputs_that_cannot_be_read_are_bad_examples_whatever_stands_beside(
    tmp_path, modality, kind
):
    members = [("a.jpg", b"no picture"), ("a.cls", b"cat"), ("b.jpg", jpeg()), ("b.txt", b"one")]
    write_tar(tmp_path / "0.tar", members)
    batches = eval_batches(
        f"tars:{tmp_path}/0.tar", DataConfig(threads=1), (modality,), batch_size=2
    )
    assert [batch["valid"].tolist() for batch in batches] == [[False, True]]
    assert batches.skipped == {kind: 1}


def test_indexes_can_be_kept_in_a_folder_of_the_config(tmp_path):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    write_tar(data / "0.tar", pairs(4))
    config = DataConfig(train=f"tars:{data}/0.tar", cache_dir=str(cache), threads=1)
    train_batches(config, IMAGE_TEXT, seed=0, global_batch_size=2)
    assert [p.name for p in data.iterdir()] == ["0.tar"]
    assert len(list(cache.iterdir())) == 1


def test_a_state_of_something_else_is_refused():
    (batches,) = _numbers(10, 5)
    with pytest.raises(ValueError, match="position of the data"):
        batches.set_state({"next_index": 3})


def test_unusable_examples_are_invalid_in_evaluation():
    batches = eval_batches(Numbers(9, bad=(0, 4)), DataConfig(threads=1), ("text",), batch_size=3)
    made = list(batches)
    valid = np.concatenate([batch["valid"] for batch in made])
    assert np.flatnonzero(~valid).tolist() == [0, 4]
    assert batches.skipped == {"image unreadable": 2}


@pytest.mark.parametrize("hosts", [2, 4])
def test_evaluation_is_dealt_to_hosts_in_equal_steps(hosts):
    config = DataConfig(threads=1)
    whole = list(eval_batches(Numbers(9), config, ("text",), batch_size=8))
    parts = [
        list(
            eval_batches(
                Numbers(9),
                config,
                ("text",),
                batch_size=8,
                process_index=host,
                process_count=hosts,
            )
        )
        for host in range(hosts)
    ]
    assert {len(part) for part in parts} == {len(whole)} == {2}
    for step, batch in enumerate(whole):
        for name in ("index", "valid"):
            joined = np.concatenate([part[step][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_an_example_is_counted_as_unusable_once_however_many_epochs_meet_it():
    """A run that passes its first epoch does not end in the second one for the same files."""
    counter = SkipCounter(0.01, length=90)
    for _ in range(5):
        counter.add_read(81)
        for index in range(9):
            counter.add_skipped(f"example {index}", BadExample("image unreadable"), index)
    assert counter.total == 9
    counter.add_skipped("example 9", BadExample("image unreadable"), 9)
    with pytest.raises(TooManyBadExamples, match="11 of the 90 examples"):
        counter.add_skipped("example 10", BadExample("image unreadable"), 10)


def test_a_position_is_counted_in_examples_so_that_the_batch_may_change():
    config = DataConfig(train="scenes:train?n=48", threads=1)

    def opened(size):
        return train_batches(config, ("image",), seed=3, global_batch_size=size)

    first, second = opened(8), opened(4)
    seen = [next(first)["index"] for _ in range(8)]  # an epoch of 6 batches, and 2 more
    second.set_state(first.get_state())
    rest = [next(second)["index"] for _ in range(8)]
    for batches in (first, second):
        batches.close()
    epoch = np.concatenate([*seen[6:], *rest])
    assert sorted(epoch.tolist()) == list(range(48))
