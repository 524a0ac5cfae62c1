"""The grammar of commands: deterministic, splits apart, zero-shot classes unseen in training."""

import pytest

from cwcl_jax.data.draws import Draws
from cwcl_jax.data.sources import open_source
from cwcl_jax.synthetic import commands


def texts(line):
    source = open_source(line)
    return [source.read(i, ("text",))["text"] for i in range(len(source))]


def test_patterns_expand_to_plain_words():
    for index in range(2000):
        made = texts_of(index)
        assert made
        assert not set("[]{}|") & set(made), made


def texts_of(index):
    intent = list(commands.INTENTS)[index % len(commands.INTENTS)]
    return commands.expand(Draws(index).pick(commands.INTENTS[intent]), Draws(index, 1))


def test_sentences_are_a_function_of_their_number_and_the_seed():
    line = "commands:train?n=300"
    assert texts(line) == texts(line)
    assert texts(line) == texts("commands:train?n=400")[:300]
    assert texts(line) != texts(line + "&seed=1")
    prints = {open_source(line + more).fingerprint() for more in ("", "&seed=1")}
    assert len(prints) == 2


def test_no_sentence_is_in_two_splits():
    train = set(texts("commands:train?n=6000"))
    devel = set(texts("commands:devel?task=intent&n=500"))
    for task in ("intent", "new_intent", "keywords", "retrieval"):
        test = set(texts(f"commands:test?task={task}&n=500"))
        assert not test & train
        assert not test & devel


def test_new_intents_and_keywords_are_never_trained_but_their_words_are():
    train = texts("commands:train?n=12000")
    assert not set(commands.KEYWORDS) & set(train)
    words = {word for sentence in train for word in sentence.split()}
    assert set(commands.KEYWORDS) <= words
    # The words of new intents are heard alone, never in a sentence.
    with_taxi = {sentence for sentence in train if "taxi" in sentence}
    assert with_taxi == {"taxi"}


def test_classes_come_in_equal_numbers_and_labels_fit_their_sentences():
    source = open_source("commands:test?task=intent&n=96")
    assert len(source.class_names) == 32
    labels = [source[i]["label"] for i in range(96)]
    assert sorted(labels) == sorted(list(range(32)) * 3)
    alarm = [source[i]["text"] for i in range(96) if source.class_names[labels[i]] == "set a timer"]
    assert len(alarm) == 3
    assert all("seconds" in t or "minutes" in t or "hours" in t for t in alarm)
    new = open_source("commands:test?task=new_intent&n=8")
    assert not set(new.class_names) & set(source.class_names)


def test_retrieval_sentences_are_distinct():
    made = texts("commands:test?task=retrieval&n=400")
    assert len(set(made)) == 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("commands:all", "train, devel and test"),
        ("commands:test", "needs task="),
        ("commands:train?task=intent", "has no tasks"),
        ("commands:train?n=-1", "must not be negative"),
    ],
)
def test_wrong_options_say_what_is_right(line, message):
    with pytest.raises(ValueError, match=message):
        open_source(line)
