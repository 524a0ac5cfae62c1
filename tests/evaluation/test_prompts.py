"""Prompt lists and files."""

import json

import pytest

from cwcl_jax.evaluation import prompts


def test_simple_templates_are_the_ten_of_table_3_in_order():
    assert len(prompts.SIMPLE) == len(set(prompts.SIMPLE)) == 10
    assert prompts.first_templates(prompts.SIMPLE, 1) == ("a photo of a {c}",)
    assert prompts.first_templates(prompts.SIMPLE, 5)[-1] == "a snap of {c}"
    assert prompts.SIMPLE[-1] == "In this picture, we can see a {c}"


def test_general_templates_are_all_48_of_a_3_5_in_order():
    """The list of the appendix follows a grammar; written out a second time from it."""
    expected = [
        f"{subject} {verb} {link} {{c}}"
        for link in ("about", "related to", "talking about")
        for subject in ("it", "this")
        for verb in ("is", "was", "will be")
    ]
    to_be = {"I": "am was", "You": "are were", "They": "are were", "We": "are were"}
    for subject, verbs in to_be.items():
        expected += [
            f"{subject} {verb} talking about {{c}}" for verb in [*verbs.split(), "will be"]
        ]
    for subject in ("it", "this"):
        expected += [f"{subject} {verb} about {{c}}" for verb in ("talks", "talked", "will talk")]
    for subject in ("I", "You", "They", "We"):
        expected += [f"{subject} {verb} about {{c}}" for verb in ("talk", "talked", "will talk")]
    assert list(prompts.GENERAL) == expected
    assert len(prompts.GENERAL) == 48


def test_every_listed_template_has_exactly_one_placeholder():
    for template in (*prompts.SIMPLE, *prompts.GENERAL):
        assert template.count("{c}") == 1
        assert prompts.canonical(template) == template


def test_user_file_is_read_with_any_way_to_write_the_placeholder(tmp_path):
    path = tmp_path / "zeroshot_classification_templates.txt"
    path.write_text("a bad photo of a {c}.\n\nart of the {}.\nthe { } again\n")
    expected = ("a bad photo of a {c}.", "art of the {c}.", "the {c} again")
    assert prompts.load_templates(str(path)) == expected
    as_json = tmp_path / "templates.json"
    as_json.write_text(json.dumps(["one {c}", "two {c}"]))
    assert prompts.load_templates(str(as_json)) == ("one {c}", "two {c}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo of a {name}", "unknown field {name}"),
        ("a photo", "no field"),
        ("a photo of {c", "an unmatched brace"),
    ],
)
def test_bad_template_is_named_with_its_problem(template, message):
    with pytest.raises(ValueError, match=message.replace("{", r"\{").replace("}", r"\}")):
        prompts.canonical(template)


def test_unknown_template_list_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match="simple"):
        prompts.load_templates("simpel")


def test_empty_template_file_is_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no template"):
        prompts.load_templates(str(tmp_path / "empty.txt"))


def test_more_templates_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="k=11, but the list has 10"):
        prompts.first_templates(prompts.SIMPLE, 11)


def test_prompts_of_the_first_k_templates_come_first():
    filled = prompts.fill(["a {c}", "the {c}"], ["cat", "kitten"])
    assert filled == ["a cat", "a kitten", "the cat", "the kitten"]
    assert filled[:2] == prompts.fill(["a {c}"], ["cat", "kitten"])


def test_dataset_sentences_are_distinct_in_order_and_limited():
    groups = prompts.sentences_by_class(["b", "a", "b", "c", "d"], [0, 0, 0, 1, 0], 3, limit=2)
    assert groups == [["b", "a"], ["c"], []]
    with pytest.raises(ValueError, match="label 3"):
        prompts.sentences_by_class(["a"], [3], 3)
    with pytest.raises(ValueError, match="1 sentences but 2 labels"):
        prompts.sentences_by_class(["a"], [0, 0], 3)


def test_keyword_sentences_hold_the_whole_word_and_the_word_itself_comes_first():
    groups = prompts.sentences_with_word(["Go on, stop it", "unstoppable", "go go"], ["stop", "go"])
    assert groups == [["stop", "Go on, stop it"], ["go", "Go on, stop it", "go go"]]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("calendar_set", "calendar set"),
        ("[IN:CREATE_ALARM", "create alarm"),
        ("IN:GET_EVENT]", "get event"),
        ("African grey", "African grey"),
        ("T_shirt", "T shirt"),
    ],
)
def test_identifiers_are_read_as_words(name, words):
    assert prompts.readable(name) == words


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ein süßer {c}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        prompts.load_templates(str(path))
    path = tmp_path / "a.json"
    path.write_text("[")
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        prompts.load_templates(str(path))
    path.write_text('["a {c}"]', encoding="utf-8-sig")
    assert prompts.load_templates(str(path)) == ("a {c}",)
