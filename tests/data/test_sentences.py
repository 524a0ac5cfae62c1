"""Sentences of a user's file: filtered, held out, with frequent words of their own."""

import pytest

from cwcl_jax.data.sources import open_source
from cwcl_jax.data.sources.sentences import frequent_words


@pytest.fixture
def folder(tmp_path):
    lines = [f"sentence number {word} of the list" for word in ("one", "two", "three", "four")]
    long = "x " * 60
    rows = ["source\tsentence", *(f"a\t{line}" for line in [*lines, lines[0], "alone", long])]
    (tmp_path / "sentences.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def texts(line):
    source = open_source(line)
    return [source[i]["text"] for i in range(len(source))]


def test_repetitions_and_sentences_too_long_or_short_are_left_out(folder):
    made = texts(f"sentences:{folder}")
    assert len(made) == 4
    assert made[1] == "sentence number two of the list"
    assert (
        texts(f"sentences:{folder}/sentences.tsv?text=sentence&min_words=1&max_chars=200") != made
    )


def test_held_out_sentences_are_those_that_training_lacks(folder):
    train, test = (texts(f"sentences:{folder}?held_out=2&split={s}") for s in ("train", "test"))
    assert len(test) == 2
    assert sorted(train + test) == sorted(texts(f"sentences:{folder}"))
    # Words are added to the training split alone.
    assert texts(f"sentences:{folder}?held_out=2&split=test&words=3") == test


def test_frequent_words_are_added_without_those_that_a_test_asks_for(folder):
    made = texts(f"sentences:{folder}?words=3&without_words=list,two")
    assert made[4:] == ["number", "of", "sentence"]
    assert frequent_words(["b a aa", "aa bb"], 5, ["bb"]) == ["aa"]


def test_a_plain_text_file_has_one_sentence_a_line(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("turn  on the light\n\nplay music\n")
    assert texts(f"sentences:{file}") == ["turn on the light", "play music"]


def test_what_cannot_work_is_an_error_with_its_remedy(folder, tmp_path):
    with pytest.raises(ValueError, match="must be below its 4 sentences"):
        open_source(f"sentences:{folder}?held_out=4")
    with pytest.raises(FileNotFoundError, match="not found"):
        open_source("sentences:/nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"sentences\.tsv"):
        open_source(f"sentences:{empty}")
    (tmp_path / "t.tsv").write_text("label\tid\n1\t2\n")
    with pytest.raises(ValueError, match="name it with text="):
        open_source(f"sentences:{tmp_path}/t.tsv")


def test_words_are_whole_in_any_alphabet():
    sentences = [
        "the caf\u00e9 in the stra\u00dfe",
        "don\u2019t say \u043f\u0440\u0438\u0432\u0435\u0442 to b2b",
    ]
    words = frequent_words(sentences, 20, [])
    assert words[0] == "the"
    assert {
        "caf\u00e9",
        "stra\u00dfe",
        "don\u2019t",
        "\u043f\u0440\u0438\u0432\u0435\u0442",
    } <= set(words)
    assert not {"caf", "stra", "don"} & set(words)
