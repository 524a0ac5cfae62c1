import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cwcl_jax.data.composers import ComposedOrder, ComposerError, compose, own_composer
from cwcl_jax.data.composers.groups import Groups
from cwcl_jax.data.composers.near import Near, neighbour_line, whole_vectors
from cwcl_jax.data.held_out import hold_out
from cwcl_jax.data.options import DataConfig
from cwcl_jax.data.order import permute_each
from cwcl_jax.data.pipeline import TrainBatches
from cwcl_jax.data.skipping import BadExample, TooManyBadExamples
from cwcl_jax.data.sources import Mixture, Source, open_source


class Items(Source):
    """Texts that are their index, with groups and features; those in `bad` cannot be read."""

    def __init__(self, groups=None, features=None, bad=()):
        self.groups, self.features, self.bad = groups, features, frozenset(bad)
        self.embedded = () if features is None else ("image",)

    def __len__(self):
        return len(self.features if self.groups is None else self.groups)

    def read(self, index, fields):
        if fields and index in self.bad:
            raise BadExample("text unreadable", "made bad")
        example = {"id": str(index), "text": f"number {index}"}
        if self.features is not None:
            example["features"] = {"image": self.features[index]}
        return example

    def column(self, name):
        return np.asarray(self.groups) if name == "group" else super().column(name)

    def fingerprint(self):
        return "items"


def _epoch(composition, epoch):
    return [composition.batch(epoch, step) for step in range(composition.steps)]


def _batches(source, batches, size, *, host=0, hosts=1, seed=0, **options) -> TrainBatches:
    config = DataConfig(threads=1, batches=batches, **options)
    return TrainBatches(
        config, ("text",), seed=seed, global_batch_size=size, process_index=host,
        process_count=hosts, source=source,
    )  # fmt: skip


def _indices(batches, steps):
    taken = [next(batches)["index"].tolist() for _ in range(steps)]
    batches.close()
    return taken


def _flat(batches):
    return list(itertools.chain.from_iterable(batches))


sizes_of_groups = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_of_groups, k=st.integers(1, 3), m=st.integers(1, 5), seed=st.integers(0, 99))
def test_each_batch_has_k_examples_of_each_of_m_groups_and_each_example_once(sizes, k, m, seed):
    groups = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)) * 7, sizes))
    packs = [size // k for size in sizes]
    # No more batches can be filled: each takes a pack from m groups, none more than one.
    most = max(t for t in range(60) if sum(min(pack, t) for pack in packs) >= m * t)
    if not most:
        with pytest.raises(ComposerError, match="takes"):
            Groups(groups, k=k, batch_size=k * m, seed=seed)
        return
    made = Groups(groups, k=k, batch_size=k * m, seed=seed)
    assert made.steps == most
    for epoch in (0, 5):
        batches = _epoch(made, epoch)
        for batch in batches:
            assert np.unique(groups[batch], return_counts=True)[1].tolist() == [k] * m
        everything = np.concatenate(batches)
        assert len(np.unique(everything)) == len(everything)
    left = len(groups) - most * k * m
    # What is not in its reasons did not fill one more batch.
    assert 0 <= left - sum(made.left_out.values()) < k * m


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 60), size=st.integers(1, 9))
def test_groups_of_one_example_leave_out_only_the_end(count, size):
    assume(size <= count)
    made = Groups(np.arange(count)[::-1].copy(), k=1, batch_size=size, seed=1)
    everything = np.concatenate(_epoch(made, 2))
    assert len(np.unique(everything)) == len(everything) == count // size * size


def test_all_groups_meet_as_often_as_in_batches_drawn_at_random():
    count, size, epochs = 40, 8, 12
    groups = np.repeat(np.arange(count), 12)
    rng = np.random.default_rng(0)
    made = Groups(groups, k=1, batch_size=size, seed=3)
    met, drawn = np.zeros((count, count)), np.zeros((count, count))
    for epoch in range(epochs):
        for batch in _epoch(made, epoch):
            met[np.ix_(groups[batch], groups[batch])] += 1
            other = rng.choice(count, size, replace=False)
            drawn[np.ix_(other, other)] += 1
    apart = ~np.eye(count, dtype=bool)
    assert met[apart].std() < 1.2 * drawn[apart].std()
    assert met[apart].min() > 0


def test_what_is_left_out_changes_from_epoch_to_epoch():
    # Of 5 each, 4 fit; group 0 is larger than there are batches.
    groups = np.repeat([0, 1, 2, 3, 4], [40, 5, 5, 5, 5])
    made = Groups(groups, k=2, batch_size=4, seed=0)
    assert made.left_out["beyond a multiple of 2 in their group"] == 4
    assert made.left_out["in groups of more than there are batches"] == 2 * (20 - made.steps)
    seen = [set(np.concatenate(_epoch(made, epoch)).tolist()) for epoch in range(30)]
    assert len(set.union(*seen)) == len(groups)
    assert len(seen[0]) < len(groups)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), key=st.integers(0, 999))
def test_permute_each_is_a_permutation_for_each(sizes, key):
    each = np.repeat(np.arange(len(sizes)), sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    images = permute_each(positions, np.repeat(sizes, sizes), each, key)
    for number, size in enumerate(sizes):
        assert sorted(images[each == number]) == list(range(size))


def _planes(count=200, width=6, clusters=20, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, width))
    cluster = np.arange(count) % clusters
    return cluster, centres[cluster] + 0.05 * rng.normal(size=(count, width))


def test_cells_of_near_hold_neighbours_and_each_example_stands_in_one_batch():
    cluster, features = _planes()
    made = compose("near:image?share=0.5&size=5", Items(features=features), 20, seed=1)
    together = []
    for epoch in range(3):
        batches = _epoch(made, epoch)
        assert sorted(np.concatenate(batches).tolist()) == list(range(200))
        for batch in batches:
            cells, rest = cluster[batch[:10].reshape(2, 5)], cluster[batch[10:]]
            together += [len(set(cell.tolist())) for cell in cells]
            assert len(set(rest.tolist())) > 4
    # 20 clusters of 10: cells that are cut at random places lie in one or two of them.
    assert np.mean(together) < 2.5
    assert not np.array_equal(made.batch(0, 0), made.batch(1, 0))


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(4, 60), size=st.integers(2, 4), batch=st.integers(4, 12),
    share=st.floats(0.1, 1), missing=st.integers(0, 3),
)  # fmt: skip
def test_near_gives_every_example_at_most_once_with_exact_shares(
    count, size, batch, share, missing
):
    assume(round(share * batch / size) >= 1 and batch <= count)
    rows = (np.random.default_rng(count).normal(size=(count, 3)) * 100).astype(np.int16)
    usable = np.arange(count) >= missing
    try:
        made = Near(rows, usable, share=share, size=size, batch_size=batch, seed=0)
    except ComposerError:
        assert missing
        return
    batches = np.stack(_epoch(made, 4))
    assert batches.shape == (count // batch, batch)
    assert len(np.unique(batches)) == batches.size
    inside = min(round(share * batch / size), batch // size) * size
    assert usable[batches[:, :inside]].all()


def test_the_line_of_neighbours_does_not_depend_on_how_a_machine_adds():
    features = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    rows, usable = whole_vectors(Items(features=features), "image")
    assert usable.all()
    assert rows.shape == (300, 128)
    sums = rows.astype(np.float32) @ rows.astype(np.float32).T
    assert np.abs(sums).max() < 1 << 23
    np.testing.assert_array_equal(sums, rows.astype(np.int64) @ rows.astype(np.int64).T)
    # Summed in another order of the dimensions, projections are the same to the bit.
    mixed = np.random.default_rng(1).permutation(128)
    line = neighbour_line(rows, 4)
    np.testing.assert_array_equal(line, neighbour_line(rows[:, mixed].copy(), 4))
    assert sorted(line) == list(range(300))


def by_tens(source, *, epoch, batch_size, seed, offset=0):
    """Batches of examples whose numbers have the same last digit."""
    numbers = np.arange(offset, len(source))
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(numbers)
    order = order[np.argsort(order % 10, kind="stable")]
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


OWN = f"{__name__}:by_tens"


def test_a_composer_of_ones_own_is_a_function_with_options():
    assert own_composer(f"{OWN}?offset=20") == [OWN]
    assert own_composer("groups:x") == own_composer("") == []
    batches = _batches(Items(np.arange(100)), f"{OWN}?offset=20", 8)
    assert batches.steps_per_epoch == 10
    for batch in _indices(batches, 10):
        assert min(batch) >= 20
        assert len({number % 10 for number in batch}) == 1
    assert "leaves out 20% of 100 examples: 20 that it does not name" in batches.told


def wrong(source, *, batch_size, what):
    numbers = np.arange(len(source) // batch_size * batch_size).reshape(-1, batch_size)
    numbers[0, 0] = {"twice": numbers[0, 1], "outside": len(source)}.get(what, 0)
    return numbers[:, 1:] if what == "shape" else numbers / 2 if what == "floats" else numbers


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("twice", "example 1 into batch 0 of epoch 0 twice"),
        ("outside", "examples 1 to 20; there are 0 to 19"),
        ("shape", r"shape \(5, 3\); expected are example numbers of shape \(steps, 4\)"),
        ("floats", "returns float64"),
    ],
)
def test_what_a_composer_of_ones_own_gives_is_checked(what, message):
    with pytest.raises(ComposerError, match=message):
        compose(f"{__name__}:wrong?what={what}", Items(np.arange(20)), 4, 0)


CASES = {
    "groups": ("groups:group?k=2", Items(np.arange(60) % 11)),
    "near": ("near:image?size=3", Items(features=_planes(60)[1])),
    "own": (OWN, Items(np.arange(60))),
}


@pytest.mark.parametrize("name", CASES)
def test_one_two_and_four_hosts_make_the_same_batches(name):
    line, source = CASES[name]
    whole = _indices(_batches(source, line, 8), 9)
    for hosts in (2, 4):
        parts = [_indices(_batches(source, line, 8, host=h, hosts=hosts), 9) for h in range(hosts)]
        assert [_flat(rows) for rows in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("name", CASES)
def test_resumed_in_the_middle_of_an_epoch_batches_go_on_the_same(name):
    line, source = CASES[name]
    straight = _batches(source, line, 8)
    whole = _indices(straight, 12)
    first = _batches(source, line, 8)
    assert _indices(first, 4) == whole[:4]
    state = json.loads(json.dumps(first.get_state()))
    fresh = _batches(source, line, 8)
    fresh.set_state(state)
    assert _indices(fresh, 8) == whole[4:]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["groups", "near"]),
    taken=st.lists(
        st.tuples(st.sampled_from([4, 6, 8, 12]), st.integers(0, 2)), min_size=2, max_size=4
    ),
)
def test_resumed_with_other_batch_sizes_an_epoch_repeats_no_example(name, taken):
    line, source = CASES[name]
    epoch, seen, before = 3, [], []
    for size, steps in taken:
        order = ComposedOrder(lambda s, b: compose(line, s, b, 5), source, size)
        where, step = order.go_on(epoch, before) if before else (epoch, 0)
        if where > epoch:
            break
        steps = min(steps, order.steps - step)
        positions = np.arange(step * size, (step + steps) * size)
        now = order.indices(epoch, positions)
        seen += now.tolist()
        before = order.taken(epoch, step + steps)
        assert sum(size * steps for size, steps in before) == len(seen)
        # What is saved gives the same order and place again.
        again = ComposedOrder(lambda s, b: compose(line, s, b, 5), source, size)
        assert again.go_on(epoch, before) == (epoch, step + steps)
        np.testing.assert_array_equal(again.indices(epoch, positions), now)
        for batch in now.reshape(-1, size) if name == "groups" else ():
            counts = np.unique(source.column("group")[batch], return_counts=True)[1]
            assert counts.tolist() == [2] * (size // 2)
    assert len(set(seen)) == len(seen)


def test_after_an_epoch_that_changed_its_batch_size_the_next_is_a_usual_one():
    line, source = CASES["groups"]
    first = _batches(source, line, 4)
    seen = _flat(_indices(first, 5))
    second = _batches(source, line, 10)
    second.set_state(first.get_state())
    left = second.steps_per_epoch - second.get_state()["step"]
    assert 0 < left <= (60 - 20) // 10
    rest = _flat(_indices(second, left))
    assert not set(seen) & set(rest)
    assert len(set(rest)) == len(rest)
    usual = _batches(source, line, 10)
    usual.set_state({"step": usual.steps_per_epoch})
    assert _indices(second, 3) == _indices(usual, 3)


def test_another_batch_size_after_which_nothing_fits_begins_the_next_epoch(caplog):
    order = ComposedOrder(lambda s, b: compose("groups:group", s, b, 0), Items(np.arange(20)), 8)
    assert order.go_on(3, [[4, 4]]) == (4, 0)
    assert "The 4 examples left of epoch 3 do not fill a batch of 8" in caplog.text


def test_an_epoch_can_be_a_part_of_what_the_batches_hold():
    source = Items(np.arange(100) // 2)
    batches = _batches(source, "groups:group", 8, examples_per_epoch=30)
    assert batches.steps_per_epoch == 3
    assert batches.left_out == pytest.approx(0.76)
    assert "76 at the end of an epoch" in batches.told


def test_replacements_keep_what_groups_promise():
    groups = np.arange(60) % 12
    usual = _batches(Items(groups), "groups:group", 6)
    epoch = _indices(usual, 10)
    # One bad example in a batch; then whole groups, whose batches take others.
    for bad in ([epoch[2][3]], np.flatnonzero(groups == 4).tolist()):
        source = Items(groups, bad=bad)
        batches = _indices(_batches(source, "groups:group", 6, max_skipped_share=0.5), 10)
        for before, batch in zip(epoch, batches, strict=True):
            assert len(set(groups[batch].tolist())) == 6
            assert not set(batch) & set(bad)
            changed = sum(one != other for one, other in zip(before, batch, strict=True))
            assert changed == len(set(before) & set(bad))


def test_two_bad_examples_of_one_pack_get_different_replacements():
    groups = np.arange(60) // 6
    usual = _batches(Items(groups), "groups:group?k=2", 6)
    bad = next(usual)["index"][2:4].tolist()
    usual.close()
    batches = _batches(Items(groups, bad=bad), "groups:group?k=2", 6, max_skipped_share=0.5)
    (batch,) = _indices(batches, 1)
    assert np.unique(groups[batch], return_counts=True)[1].tolist() == [2, 2, 2]
    assert len(set(batch)) == 6


def test_an_example_that_nothing_can_replace_is_a_mistake_in_the_data():
    batches = _batches(Items(np.arange(6), bad=[4]), "groups:group", 6, max_skipped_share=0.5)
    told = r"^example 4 \(4\) is unusable \(text unreadable: made bad\), and no other example can "
    with pytest.raises(ComposerError, match=told + "take its place in batch 0 of epoch 0"):
        _indices(batches, 1)
    batches.close()
    batches = _batches(Items(np.arange(6), bad=range(6)), "", 6, max_skipped_share=1.0)
    with pytest.raises(TooManyBadExamples, match="200 examples in a row"):
        _indices(batches, 1)
    batches.close()


def test_near_replaces_by_what_the_batch_does_not_have():
    line, source = CASES["near"]
    (first,) = _indices(_batches(source, line, 8), 1)
    bad = first[1:3]
    hurt = Items(features=source.features, bad=[])
    hurt.bad = frozenset()
    batches = _batches(hurt, line, 8, max_skipped_share=0.5)
    hurt.bad = frozenset(bad)  # unreadable as text, while its features are known
    (batch,) = _indices(batches, 1)
    assert len(set(batch)) == 8
    assert not set(batch) & set(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": "near:image?size=17"}, "size=17 neighbours .* make no cell"),
        ({"batches": "near:image?sise=4"}, "has no option 'sise'"),
        ({"batches": "near:image", "mixture_temperature": 2.0}, "at most once per epoch"),
    ],
)
def test_near_is_checked_before_its_features_exist(options, message):
    batches = _batches(Mixture([Items(np.arange(16)), Items(np.arange(16))]), "", 16)
    batches.check_composed(DataConfig(batches="near:image"))
    with pytest.raises(ValueError, match=message):
        batches.check_composed(DataConfig(**options))


@pytest.mark.parametrize(
    "values",
    [
        np.array(["a", "b", "", "a"], object),
        np.array(["a", "b", None, "a"], object),
        np.array(["a", "b", " ", "a"], object),
        np.array(["a", "b", float("nan"), "a"], object),
        np.array([1.0, 2.0, np.nan, 1.0]),
        np.array([0, 1, -1, 0]),
    ],
)
def test_a_gap_in_the_column_is_refused_with_its_row(values):
    source = Items(np.arange(4))
    source.groups = values
    source.column = lambda name: values
    with pytest.raises(ComposerError, match=r"1 of 4 examples .* example 2 \(2\), row 3 of the"):
        compose("groups:group", source, 2, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("groups:colour", "no column 'colour'. There are label, text; columns_from=colour:FILE"),
        ("groups:", "names no column"),
        ("groups:group?q=2", "composer 'groups' has no option 'q'.*It has: k"),
        ("groups:group?k=3", "k=3 .* do not fill a batch of 8"),
        ("groups:group?k=0", "k=0 must be at least 1"),
        # 3 groups have 2 examples, 6 have 1; a batch of 8 takes 4 of the former, 8 of the latter.
        ("groups:group?k=2", "takes 4 groups, but 'group' has 3 of at least 2: lower [^ ]*$"),
        ("group:group", "no module 'group'.*did you mean 'groups:'"),
        ("near:image", r"near:image needs features .*has none.*keep_locked_features"),
        ("gruops:group/x", "names no composer, did you mean 'groups'"),
        ("groups:group::near:image", "names 2 composers"),
        ("no_such_module:name", "there is no module 'no_such_module'"),
    ],
)
def test_what_cannot_be_composed_is_refused(line, message):
    with pytest.raises(ComposerError, match=message):
        compose(line, Items(np.array([0, 0, 1, 1, 2, 2, 3, 4, 5])), 8, 0)


@pytest.mark.parametrize(("share", "size"), [(0, 4), (1.5, 4), (0.5, 1), (0.5, 9), (0.1, 8)])
def test_cells_that_do_not_fit_are_refused(share, size):
    with pytest.raises(ComposerError, match="make no cell"):
        compose(f"near:image?share={share}&size={size}", Items(features=_planes()[1]), 8, 0)


def test_the_fingerprint_holds_the_line_and_the_column():
    def of(groups, line="groups:group"):
        return json.dumps(_batches(Items(np.asarray(groups)), line, 4).fingerprint())

    assert of([0, 1, 2, 3, 4, 5]) == of([0, 1, 2, 3, 4, 5])
    assert of([0, 1, 2, 3, 4, 5]) != of([0, 1, 2, 3, 4, 4])
    twice = [0, 0, 1, 1, 2, 2, 3, 3]
    assert of(twice) != of(twice, "groups:group?k=2")
    assert "batches" not in _batches(Items(np.arange(6)), "", 4).fingerprint()


def test_columns_follow_subsets_mixtures_and_held_out_shares(tmp_path):
    np.save(tmp_path / "speaker.npy", np.arange(40) % 7)
    line = f"scenes:train?n=40&columns_from=speaker:{tmp_path}/speaker.npy"
    source = open_source(line)
    assert pickle.loads(pickle.dumps(source)).column("speaker").tolist() == [*np.arange(40) % 7]
    kept, held = hold_out(source, 0.25, seed=0)
    both = np.concatenate([kept.column("speaker"), held.column("speaker")])
    assert sorted(both.tolist()) == sorted((np.arange(40) % 7).tolist())
    mixed = Mixture([kept, held])
    assert mixed.column("speaker").tolist() == both.tolist()
    assert mixed.column("part").tolist() == [0] * 30 + [1] * 10
    texts = source.column("text")
    assert texts.shape == (40,)
    assert texts[3] == source.read(3, ("text",))["text"].casefold()
    with pytest.raises(ValueError, match="NAME:FILE"):
        open_source(f"scenes:train?n=40&columns_from={tmp_path}/speaker.npy")
    with pytest.raises(ValueError, match="have a column 'speaker' already"):
        open_source(f"{line},speaker:{tmp_path}/speaker.npy")
    with pytest.raises(ValueError, match=r"shape \(40,\), the source 30"):
        open_source(line.replace("n=40", "n=30"))


def test_the_temperature_of_a_mixture_sets_the_shares_of_its_parts():
    source = Mixture([Items(np.arange(90)), Items(np.arange(10))])

    def parts(temperature, **options):
        made = _batches(source, "", 10, mixture_temperature=temperature, **options)
        numbers = np.concatenate(_indices(made, made.steps_per_epoch))
        return (numbers >= 90).sum(), made.told

    assert parts(1.0) == (10, "")
    count, told = parts(2.0)  # sqrt(90) to sqrt(10) is 3 to 1
    assert count == 25
    assert "25% (2.5 times its 10)" in told
    assert parts(1e9)[0] == 50
    with pytest.raises(ValueError, match="needs several parts"):
        _batches(Items(np.arange(20)), "", 4, mixture_temperature=2.0)
    with pytest.raises(ValueError, match="uses every example at most once"):
        _batches(source, "groups:group", 4, mixture_temperature=2.0)
    with pytest.raises(ValueError, match="positive"):
        DataConfig(mixture_temperature=0.0)


def test_options_that_nobody_would_read_are_refused():
    with pytest.raises(ValueError, match="shuffle=True"):
        DataConfig(batches="groups:x", shuffle=False)
    with pytest.raises(ValueError, match="validation_composed needs"):
        DataConfig(batches="groups:x", validation_composed=True)
