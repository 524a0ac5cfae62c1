"""Folders that sentence-transformers saves, read completely; and folders that it opens.

The models are tiny, random, and made by the library itself; nothing is downloaded.
"""

import dataclasses
import json
import logging
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file

from cwcl_jax.api import Model
from cwcl_jax.export import export
from cwcl_jax.modalities import TextInputs
from cwcl_jax.models.dense import layers_of
from cwcl_jax.models.pooling import pool
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete, import_tower
from cwcl_jax.pretrained.folder import ModelDescription
from cwcl_jax.weights.sentence_folder import read_sentence_folder, read_text_settings
from tests.modalities.test_text import byte_pairs, word_pieces
from tests.models.builders import filled, one_tower
from tests.pretrained.test_folder_config import folder, load, write_json
from tests.pretrained.test_parity import randomise
from tests.pretrained.test_text_families import imported
from tests.test_api import IMAGE, INPUTS, model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["red star", "A Blue star and a red star", "stars"]
SIZES = {"vocab_size": 48, "max_tokens": 18, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}


@pytest.fixture
def library():
    """sentence-transformers, which the test extra brings: its import takes seconds."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sentence_transformers

    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    return sentence_transformers


def encoded(library, path, texts=TEXTS):
    theirs = library.SentenceTransformer(str(path), device="cpu", local_files_only=True)
    return theirs.encode(texts, show_progress_bar=False)


def compiled(tower, inputs):
    """Embeds of texts by a tower, as its compiled program gives them."""
    run = jax.jit(lambda arrays: tower(arrays))

    def embeds(texts, **changes):
        arrays = dataclasses.replace(inputs, **changes).batch(texts)
        return np.asarray(run({name: jnp.asarray(array) for name, array in arrays.items()}))

    return embeds


THEIR_POOLINGS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean",
    "last": "lasttoken",
}


def test_every_pooling_is_that_of_sentence_transformers(library):
    from sentence_transformers.sentence_transformer.modules import Pooling

    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(3, 6, 5)).astype(np.float32)
    mask = np.arange(6)[None, :] < np.array([[6], [3], [1]])
    made = {}
    for ours, theirs in THEIR_POOLINGS.items():
        features = {"token_embeddings": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}
        features["attention_mask"] = features["attention_mask"].long()
        expected = Pooling(5, theirs)(features)["sentence_embedding"].numpy()
        made[ours] = np.asarray(pool(jnp.asarray(tokens), jnp.asarray(mask), ours))
        np.testing.assert_allclose(made[ours], expected, atol=1e-5, err_msg=ours)
        # A non-finite number at a padded place stays there.
        spoilt = jnp.where(jnp.asarray(mask)[:, :, None], jnp.asarray(tokens), jnp.nan)
        np.testing.assert_array_equal(pool(spoilt, jnp.asarray(mask), ours), made[ours])
        nobody = pool(jnp.asarray(tokens), jnp.zeros((3, 6), bool), ours)
        assert np.isfinite(np.asarray(nobody)).all()
    assert len({array.tobytes() for array in made.values()}) == len(made)


def saved_model(library, path, *, old=False):
    """A BERT with dense layers and a prompt, as the library saves it; `old` as LaBSE was saved."""
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    source = word_pieces(path.with_name("tokens"))
    sizes = {"vocab_size": 10, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=20, max_position_embeddings=20)
    bert = randomise(transformers.BertModel(config))
    bert.save_pretrained(source)
    tokenizer = transformers.BertTokenizerFast(str(source / "vocab.txt"), do_lower_case=False)
    tokenizer.save_pretrained(source)
    transformer = Transformer(str(source), max_seq_length=9, do_lower_case=True)
    torch.manual_seed(0)
    modules = [
        transformer,
        Pooling(12, "weightedmean"),
        Dense(12, 7, activation_function=torch.nn.Tanh()),
        Dense(7, 5, bias=False, activation_function=None),
        Normalize(),
    ]
    prompts = {"prompts": {"query": "a blue ", "document": ""}, "default_prompt_name": "query"}
    made = library.SentenceTransformer(modules=modules, device="cpu", **prompts)
    made.save(str(path), create_model_card=False)
    if old:
        settings = json.loads((path / "sentence_bert_config.json").read_text())
        below = path / "0_Transformer"
        below.mkdir()
        for name in ("config.json", "model.safetensors", "sentence_bert_config.json"):
            (path / name).rename(below / name)
        old_settings = settings | {"max_seq_length": 9, "do_lower_case": True}
        write_json(below / "sentence_bert_config.json", old_settings)
        listed = json.loads((path / "modules.json").read_text())
        listed[0]["path"] = "0_Transformer"
        kinds = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
        for module, kind in zip(listed, kinds, strict=True):
            module["type"] = f"sentence_transformers.models.{kind}"
        write_json(path / "modules.json", listed)
        for name in ("2_Dense", "3_Dense"):
            arrays = load_file(path / name / "model.safetensors")
            torch.save(arrays, path / name / "pytorch_model.bin")
            (path / name / "model.safetensors").unlink()
    return made


def test_a_folder_with_dense_layers_prompt_and_small_letters_gives_the_librarys_embeds(
    library, tmp_path
):
    theirs = saved_model(library, tmp_path / "model")
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    assert read_sentence_folder(tmp_path / "model").dense == "7:tanh,5:identity:no_bias"
    tower = imported("bert", tmp_path / "model")
    inputs = TextInputs(tokenizer=str(tmp_path / "model"), max_tokens=9, prompt="a blue ")
    inputs = dataclasses.replace(inputs, lower_case=True)
    inputs.check_files(tmp_path / "model", "data.text")
    embeds = compiled(tower, inputs)
    np.testing.assert_allclose(embeds(TEXTS), expected, atol=1e-5)
    assert read_text_settings(tmp_path / "model").max_tokens == 9
    assert np.abs(embeds(TEXTS, prompt="none") - expected).max() > 1e-2


def test_an_older_folder_keeps_its_encoder_below_and_its_dense_layers_as_pytorchs(
    library, tmp_path
):
    theirs = saved_model(library, tmp_path / "model", old=True)
    expected = theirs.encode(TEXTS, show_progress_bar=False)
    tower = imported("bert", tmp_path / "model")
    inputs = TextInputs(tokenizer=str(tmp_path / "model"), max_tokens=9, prompt="a blue ")
    inputs = dataclasses.replace(inputs, lower_case=True)
    np.testing.assert_allclose(compiled(tower, inputs)(TEXTS), expected, atol=1e-5)
    below = imported("bert", tmp_path / "model" / "0_Transformer")
    np.testing.assert_allclose(compiled(below, inputs)(TEXTS), expected, atol=1e-5)
    assert read_text_settings(tmp_path / "model").lower_case


def test_what_a_folder_does_to_texts_is_asked_for_by_name(tmp_path):
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 8, "do_lower_case": True})
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    write_json(tmp_path / "config_sentence_transformers.json", prompts)
    inputs = TextInputs(max_tokens=8)
    with pytest.raises(ValueError, match=r"lower case.*--data.text.lower_case=True"):
        inputs.check_files(tmp_path, "data.text")
    small = dataclasses.replace(inputs, lower_case=True)
    with pytest.raises(ValueError, match=r"puts 'query: ' .*--data.text.prompt='query: '.*'none'"):
        small.check_files(tmp_path, "data.text")
    for prompt in ("query: ", "passage: ", "none"):
        dataclasses.replace(small, prompt=prompt).check_files(tmp_path, "data.text")
    write_json(
        tmp_path / "config_sentence_transformers.json", prompts | {"default_prompt_name": "x"}
    )
    with pytest.raises(
        ValueError, match="default_prompt_name 'x' is not one of its prompts: query"
    ):
        small.check_files(tmp_path, "data.text")


def test_prompts_without_a_default_and_longer_texts_are_said(tmp_path, caplog):
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 8})
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": None}
    write_json(tmp_path / "config_sentence_transformers.json", prompts)
    with caplog.at_level(logging.WARNING, logger="absl"):
        TextInputs(max_tokens=9).check_files(tmp_path, "data.text")
    assert "query 'query: '" in caplog.text
    assert "texts at 8 tokens, data.text.max_tokens is 9" in caplog.text


def test_options_of_texts_that_change_nothing_leave_the_fingerprint_alone():
    plain = TextInputs().fingerprint()
    assert not {"prompt", "lower_case"} & plain.keys()
    assert TextInputs(prompt="none").fingerprint()["vocabulary"] == plain["vocabulary"]
    assert TextInputs(prompt="a ").fingerprint()["vocabulary"] != plain["vocabulary"]


def test_small_letters_are_made_whatever_the_tokenizer_does(tmp_path):
    inputs = TextInputs(tokenizer=str(word_pieces(tmp_path / "tokens")), max_tokens=8)
    cased = json.loads(inputs.loaded._fast.to_str()) | {"normalizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(cased))
    inputs = dataclasses.replace(inputs, tokenizer=str(tmp_path / "tokenizer.json"))
    small = dataclasses.replace(inputs, lower_case=True)
    expected = inputs.batch(["red star"])["tokens"]
    assert (inputs.batch(["RED Star"])["tokens"] != expected).any()
    np.testing.assert_array_equal(small.batch(["RED Star"])["tokens"], expected)


@pytest.mark.parametrize(
    "content",
    [
        {"transformer_task": "text-generation"},
        {"processing_kwargs": {"text": {"max_length": 3}}},
        {"modality_config": {"text": {"method_output_name": "pooler_output"}}},
    ],
)
def test_another_way_through_the_encoder_is_refused(tmp_path, content):
    write_json(tmp_path / "sentence_bert_config.json", content)
    with pytest.raises(ValueError, match=r"sentence_bert_config.json: \w+=.* is not supported"):
        read_text_settings(tmp_path)


def modules(path, *kinds, types="sentence_transformers.models."):
    weights = folder(path)
    listed = [{"path": f"{n}_{kind}", "type": types + kind} for n, kind in enumerate(kinds)]
    listed[0]["path"] = ""
    write_json(path / "modules.json", listed)
    return weights


DENSE = {"in_features": 8, "out_features": 3, "bias": True}


@pytest.mark.parametrize(
    ("kinds", "dense", "message"),
    [
        (["LSTM"], {}, r"also pass through 2_LSTM \(sentence_transformers.models.LSTM\)"),
        (["Normalize", "Dense"], {}, r"Dense \(3_Dense\) is in a place where a tower has none"),
        (["Pooling"], {}, r"Pooling \(2_Pooling\) is in a place where a tower has none"),
        (["Dense"], {"activation_function": "my.Own"}, "activation 'my.Own' is not supported"),
        (["Dense"], {"use_residual": True}, "a residual"),
        (["Dense"], {"module_input_name": "token_embeddings"}, "an input other than the sentence"),
    ],
)
def test_modules_that_a_tower_does_not_have_are_refused(tmp_path, kinds, dense, message):
    weights = modules(tmp_path, "Transformer", "Pooling", *kinds)
    write_json(tmp_path / "2_Dense" / "config.json", DENSE | dense)
    with pytest.raises(ValueError, match=message):
        complete(TowerConfig("bert", weights=weights))


def test_dense_layers_and_pooling_that_a_tower_has_otherwise_are_named_with_both(tmp_path):
    weights = modules(tmp_path, "Transformer", "Pooling", "Dense")
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
    write_json(tmp_path / "2_Dense" / "config.json", DENSE)
    taken = complete(TowerConfig("bert", weights=weights))
    assert (taken.overrides["dense"], taken.overrides["pooling"]) == ("3:tanh", "mean")
    sizes = {k: v for k, v in taken.overrides.items() if k not in ("dense", "pooling")}
    preset = TowerConfig("bert", "tiny", sizes | {"pooling": "mean"}, weights=weights)
    with pytest.raises(WeightsMismatch, match=r"dense layers '3:tanh'.*preset 'tiny' has ''"):
        load(preset)
    without = dataclasses.replace(preset, overrides=preset.overrides | {"dense": ""})
    load(without)  # on purpose
    configured = dataclasses.replace(without, overrides=sizes | {"dense": ""}, pooling="cls")
    with pytest.raises(WeightsMismatch, match=r"pools by 'mean'.*1_Pooling.*pooling='cls' by 'cls"):
        load(configured)
    chosen = dataclasses.replace(without, overrides=sizes | {"dense": "", "pooling": "cls"})
    load(chosen)  # on purpose


def test_a_prompt_that_is_left_out_of_the_pooling_is_refused(tmp_path):
    weights = modules(tmp_path, "Transformer", "Pooling")
    write_json(tmp_path / "1_Pooling" / "config.json", {"include_prompt": False})
    with pytest.raises(ValueError, match="include_prompt=false"):
        complete(TowerConfig("bert", weights=weights))


@pytest.mark.parametrize("text", ["8", "8:mish", "x:tanh", "8:tanh:bias"])
def test_dense_layers_written_otherwise_are_refused(text):
    with pytest.raises(ValueError, match=r"is not WIDTH:ACTIVATION"):
        layers_of(text)
    assert list(map(str, layers_of("7:tanh, 5:identity:no_bias"))) == [
        "7:tanh",
        "5:identity:no_bias",
    ]


EXPORTED = {
    "bert": TowerConfig("bert", overrides=SIZES | {"dense": "6:tanh"}, pooling="pooler"),
    "roberta": TowerConfig("roberta", overrides=SIZES, pooling="last"),
    "mpnet": TowerConfig("mpnet", overrides=SIZES, pooling="max"),
    "modernbert": TowerConfig(
        "modernbert", overrides=SIZES | {"local_window": 6}, pooling="mean_sqrt_len"
    ),
    "text": TowerConfig("text", overrides=SIZES, pooling="mean", scan_layers=True),
}


@pytest.mark.parametrize("encoder", EXPORTED)
def test_an_exported_text_tower_gives_the_same_embeds_in_the_library_and_here(
    library, tmp_path, encoder
):
    pieces = word_pieces if encoder in ("bert", "text") else byte_pairs
    tokens = pieces(tmp_path / "tokens")
    inputs = TextInputs(tokenizer=str(tokens), max_tokens=17, prompt="a ", lower_case=True)
    towers = {"image": IMAGE, "text": EXPORTED[encoder]}
    description = ModelDescription(towers, 8, inputs=INPUTS | {"text": inputs})
    definition, shapes = description.abstract()
    two = Model(definition, filled(shapes), description)
    export(two, tmp_path / "out", "sentence-transformers")
    texts = ["red star", "A Blue star", "stars red"]
    expected = two.encode_text(texts)
    assert expected.shape == (3, 8)
    np.testing.assert_allclose(encoded(library, tmp_path / "out", texts), expected, atol=1e-5)
    if encoder == "text":  # its pre-norm layers have no reader here: own exports have them
        return
    again = imported(encoder, tmp_path / "out")
    read = TextInputs(tokenizer=str(tmp_path / "out"), max_tokens=17, prompt="a ")
    read.check_files(tmp_path / "out", "data.text")
    np.testing.assert_allclose(compiled(again, read)(texts), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (TowerConfig("bart", "tiny"), "encoder 'bart' fits no class"),
        (TowerConfig("text", "tiny", {"causal": True}), "causal attention"),
        (TowerConfig("bert", "tiny", head="mlp"), "train with head='linear'"),
        (TowerConfig("mpnet", "tiny"), "tokenizer pads with 0"),
        (TowerConfig("bert", "tiny", {"dense": "8:quick_gelu"}), "no activation 'quick_gelu'"),
    ],
)
def test_a_tower_that_the_library_cannot_have_is_refused_with_the_reason(tmp_path, tower, message):
    small = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 24}
    tower = dataclasses.replace(tower, overrides=small | dict(tower.overrides))
    with pytest.raises(ValueError, match=message):
        export(model(image=IMAGE, text=tower), tmp_path / "out", "sentence-transformers")
    assert not (tmp_path / "out" / "modules.json").exists()


def test_a_tower_reads_its_dense_layers_only_where_it_has_them(tmp_path):
    weights = modules(tmp_path, "Transformer", "Pooling", "Dense")
    write_json(tmp_path / "2_Dense" / "config.json", DENSE)
    (tmp_path / "2_Dense" / "model.safetensors").write_bytes(b"")
    config = complete(TowerConfig("bert", weights=weights, overrides={"dense": ""}))
    _, leaves = one_tower(config)
    import_tower(config, "text", {f"towers/text/{p}": x for p, x in leaves.items()})
