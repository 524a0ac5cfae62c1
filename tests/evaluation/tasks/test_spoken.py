"""Intent and keyword tasks: dataset sentences, general templates, the text upper bound."""

from dataclasses import replace

import numpy as np
import pytest

from cwcl_jax.evaluation.report import terminal_report
from cwcl_jax.evaluation.runner import run_task
from cwcl_jax.evaluation.tasks.spoken import Intent, Keywords
from tests.evaluation.analytic import DATA, Analytic, Memory, give_sources

INTENTS = ["red_circle", "blue_square"]
WORDS = {
    "red": np.array([1.0, 0, 0]),
    "circle": np.array([1.0, 0, 0]),
    "blue": np.array([0, 1.0, 0]),
    "square": np.array([0, 1.0, 0]),
    "star": np.array([0, 0, 1.0]),
}
# Level of the recording -> embedding: 100 sounds like the first intent, 101 like the second.
TABLE = np.zeros((256, 3))
TABLE[100], TABLE[101], TABLE[102] = [1, 0, 0], [0, 1, 0], [0, 0.2, 1]


def recordings(values, labels, texts, names, **more):
    return Memory(values, labels=labels, texts=texts, class_names=names, modality="speech", **more)


def run(task):
    return run_task("t", task, encode=Analytic(TABLE, WORDS), data=DATA, batch_size=4)


def test_intents_with_dataset_templates_general_templates_and_upper_bound(monkeypatch):
    test = recordings(
        [100, 101, 101, 100],
        [0, 1, 0, 1],
        ["a red circle", "a blue square", "a circle", "a square"],
        INTENTS,
    )
    # The other split numbers its classes in another way, and has one more.
    devel = recordings(
        [100, 100, 100],
        [2, 0, 1],
        ["circle", "the square", "a star"],
        [INTENTS[1], "x", INTENTS[0]],
    )
    give_sources(monkeypatch, test=test, devel=devel)
    task = Intent(source="memory:test", template_source="memory:devel")
    result = run(task)
    assert result.metrics["top1"] == result.metrics["top1_general"] == 0.5
    assert result.metrics["top5"] == 1.0
    assert result.metrics["text_top1"] == result.metrics["text_top1_general"] == 1.0
    assert result.extras["prompt_sets"] == {"": ("dataset", 2), "_general": ("general", 96)}
    shown = terminal_report([result])
    assert "general (96), the text itself" in shown


def test_intent_without_sentences_is_no_candidate_and_counts_as_wrong(monkeypatch):
    test = recordings([100, 101], [0, 1], ["red", "blue"], INTENTS)
    devel = recordings([100], [0], ["circle"], INTENTS)
    give_sources(monkeypatch, test=test, devel=devel)
    task = Intent(source="memory:test", template_source="memory:devel")
    result = run(task)
    assert result.metrics["top5"] == 0.5
    assert result.metrics["top1_general"] == 1.0
    assert "blue_square" in result.warnings[0]
    assert "1 item(s) count as wrong" in result.warnings[0]


def test_keywords_use_the_word_itself_and_show_the_supervised_figures(monkeypatch):
    test = recordings([100, 101, 102], [0, 1, 2], None, ["circle", "square", "star"])
    give_sources(monkeypatch, test=test)
    result = run(Keywords(source="memory:test"))
    assert result.metrics["top1"] == 1.0
    assert "text_top1" not in result.metrics
    assert result.extras["prompt_sets"][""] == ("name", 3)
    assert "KWT-2" not in terminal_report([result])  # other recordings than the published ones
    theirs = replace(result, task=replace(result.task, source="speech_commands:/data"))
    assert "KWT-2" in terminal_report([theirs])
    assert "97.74" in terminal_report([theirs])


def test_keywords_with_sentences_that_hold_the_word(monkeypatch):
    test = recordings([100, 101], [0, 1], None, ["circle", "square"])
    texts = Memory([0, 0, 0], texts=["a circle", "a big square", "nothing"])
    give_sources(monkeypatch, test=test, texts=texts)
    task = Keywords(source="memory:test", template_source="memory:texts")
    assert run(task).extras["prompt_sets"][""] == ("dataset", 4)


def test_recordings_shorter_than_a_frame_are_counted(monkeypatch):
    test = recordings([100, 101], [0, 1], None, ["circle", "square"], samples=[399, 400])
    give_sources(monkeypatch, test=test)
    result = run(Keywords(source="memory:test"))
    assert "1 speech item(s) are shorter than one frame (400 samples)" in result.warnings[0]


def test_recordings_of_one_sentence_are_resampled_together(monkeypatch):
    values, labels = [100] * 20 + [101] * 20, [0] * 20 + [0] * 20
    test = recordings(values, labels, ["red"] * 20 + ["circle"] * 20, INTENTS)
    give_sources(monkeypatch, test=test)
    result = run(Intent(source="memory:test", templates="general"))
    assert result.metrics["top1"] == 0.5
    assert result.intervals["top1"] == (0.0, 1.0)
    assert len(np.unique(result.items["groups"])) == 2


def test_general_templates_alone_are_the_first_set(monkeypatch):
    give_sources(monkeypatch, test=recordings([100], [0], None, INTENTS))
    task = Intent(source="memory:test", templates="general")
    result = run(task)
    assert list(result.extras["prompt_sets"]) == [""]
    assert result.metrics["top1"] == pytest.approx(1.0)


def test_intervals_do_not_depend_on_the_text_upper_bound(monkeypatch):
    """Sentences group the items whether their texts are scored or not."""
    values, labels = [100, 101, 101, 100] * 10, [0, 1, 0, 1] * 10
    texts = ["a red circle", "a blue square", "a circle", "a square"] * 10
    give_sources(monkeypatch, test=recordings(values, labels, texts, INTENTS))
    task = Intent(source="memory:test", templates="general")
    bound, plain = (run(replace(task, text_upper_bound=on)) for on in (True, False))
    assert "text_top1" in bound.metrics
    assert "text_top1" not in plain.metrics
    assert plain.intervals["top1"] == bound.intervals["top1"]
    np.testing.assert_array_equal(plain.items["groups"], bound.items["groups"])
