import pickle

import numpy as np
import pytest

from cwcl_jax.data.sources import SOURCE_KINDS, Mixture, Subset, open_source
from cwcl_jax.data.sources.base import Source, parse_source_line
from cwcl_jax.data.sources.columns import StringColumn
from cwcl_jax.data.sources.files import expand_pattern


def test_a_line_is_kind_path_and_options():
    (part,) = parse_source_line("tars:/data/{0..9}.tar?text=json:caption&weight=2")
    assert (part.kind, part.path) == ("tars", "/data/{0..9}.tar")
    assert part.options == {"text": "json:caption", "weight": "2"}


def test_signs_in_values_can_be_escaped():
    (part,) = parse_source_line("csv:/a.csv?text=a%26b%3Fc")
    assert part.options == {"text": "a&b?c"}


def test_a_bare_path_has_the_kind_of_the_part_before_it():
    parts = parse_source_line("tars:/a/{0..1}.tar::/b/0.tar?weight=2::scenes:train")
    assert [part.kind for part in parts] == ["tars", "tars", "scenes"]
    assert parts[1].path == "/b/0.tar"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "without a kind"),
        ("/data/0.tar", "without a kind"),
        ("scense:train", "'scenes'"),
        ("scenes:train?siez=32", "'size'"),
        ("scenes:train?size=big", "of type int"),
        ("scenes:train?size", "has no value"),
        ("scenes:train?weight=0::scenes:train?weight=1", "positive"),
        ("scenes:train?weight=2::scenes:train", "have not"),
        ("slurp:/nowhere?unit=words", "recordings or sentences"),
        ("csv:/x?quoting=maybe", "auto, on or off"),
        ("tars:gs://bucket/0.tar", "not a local path"),
        ("tars:/x/{5..a}.tar", "two numbers"),
    ],
)
def test_mistakes_are_named_with_their_remedy(line, message):
    with pytest.raises(ValueError, match=message):
        open_source(line)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in SOURCE_KINDS
        if kind not in ("scenes", "commands", "made", "spoken", "tfds", "arrays")
    ],
)
def test_a_missing_path_is_named(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_source(f"{kind}:{tmp_path}/nothing")


def test_patterns_expand_like_a_shell():
    assert expand_pattern("/x/{08..11}.tar") == [f"/x/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_pattern("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    assert expand_pattern("{9..10}") == ["9", "10"]
    assert expand_pattern("plain") == ["plain"]


def test_globs_are_sorted_and_must_match(tmp_path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_text("")
    assert expand_pattern(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    with pytest.raises(FileNotFoundError, match="No file matches"):
        expand_pattern(f"{tmp_path}/*.zip")


def test_a_mixture_is_the_parts_one_after_another():
    mixture = open_source("scenes:train?n=5::scenes:train?n=3&seed=1")
    assert isinstance(mixture, Mixture)
    assert len(mixture) == 8
    parts = [open_source("scenes:train?n=5"), open_source("scenes:train?n=3&seed=1")]
    expected = [part.read(i, ("text",)) for part in parts for i in range(len(part))]
    assert [mixture.read(i, ("text",)) for i in range(8)] == expected
    with pytest.raises(IndexError, match="8 examples"):
        mixture[8]


def test_class_names_survive_a_mixture_of_equal_ones():
    line = "scenes:test?task=shape&n=10"
    assert open_source(f"{line}::{line}&seed=2").class_names is not None
    assert open_source(f"{line}::scenes:test?task=colour&n=10").class_names is None


def test_fingerprints_tell_sources_apart():
    lines = [
        "scenes:train?n=5",
        "scenes:train?n=6",
        "scenes:train?n=5&seed=1",
        "scenes:train?n=5::scenes:train?n=6",
        "scenes:train?n=5&weight=1::scenes:train?n=6&weight=2",
        "scenes:test?task=shape&n=5",
    ]
    prints = [open_source(line).fingerprint() for line in lines]
    assert len(set(prints)) == len(lines)
    assert prints == [open_source(line).fingerprint() for line in lines]


def test_a_subset_renumbers():
    source = open_source("scenes:train?n=20")
    subset = Subset(source, range(5, 9))
    assert len(subset) == 4
    assert subset.read(0, ())["id"] == source.read(5, ())["id"]
    assert subset.fingerprint() != Subset(source, range(5, 10)).fingerprint()
    assert isinstance(subset, Source)


@pytest.mark.parametrize("line", ["scenes:train?n=9", "scenes:train?n=4::scenes:train?n=5"])
def test_sources_can_be_sent_to_another_process(line):
    source = open_source(line)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7, ("text",)) == source.read(7, ("text",))


def test_columns_keep_strings_and_their_absence():
    values = ["a", None, "", "äöü 日本", "x" * 1000]
    column = StringColumn(values)
    assert [column[i] for i in range(5)] == values
    assert len(column) == 5
    assert column.digest_parts() != StringColumn([*values[:-1], "y"]).digest_parts()
    copy = pickle.loads(pickle.dumps(column))
    assert copy[3] == values[3]


def test_a_million_strings_are_two_arrays():
    column = StringColumn(str(number) for number in range(100_000))
    assert column[99_999] == "99999"
    assert isinstance(column._ends, np.ndarray)
