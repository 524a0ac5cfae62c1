"""The public model object: one item or many, any batch size, from a folder that was exported."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import cwcl_jax
from cwcl_jax.api import Model
from cwcl_jax.data.embeddings import EmbeddingDescription, EmbeddingWriter
from cwcl_jax.data.skipping import BadExample
from cwcl_jax.modalities import FeatureInputs, ImageInputs, SpeechInputs, TextInputs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch
from cwcl_jax.pretrained.folder import ModelDescription, save_folder
from cwcl_jax.weights.writers import write_safetensors
from tests.models.builders import filled

IMAGE = TowerConfig(
    "vit",
    "tiny",
    {"image_size": 16, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24},
    tune="none",
)
TEXT = TowerConfig("text", "tiny", {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24})
SPEECH = TowerConfig(
    "conv_speech",
    "tiny",
    {"stem": [8, 8], "width": 8, "dilations": [1], "heads": 2},
)


INPUTS = {
    "image": ImageInputs(size=16),
    "text": TextInputs(max_tokens=16),
    "speech": SpeechInputs(max_seconds=0.5),
}


def model(**towers):
    towers = towers or {"image": IMAGE, "text": TEXT}
    description = ModelDescription(
        towers,
        embed_dim=8,
        inputs={
            name: FeatureInputs(shape=(6,)) if tower.encoder == "precomputed" else INPUTS[name]
            for name, tower in towers.items()
        },
    )
    definition, shapes = description.abstract()
    leaves = filled(shapes) | {"logit_scale": jax.numpy.log(10.0)}
    return Model(definition, leaves, description)


def pictures(count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return list(pixels)


TEXTS = ["a red circle", "a blue square left of a green triangle", "two circles"]


def test_one_item_and_many_give_the_same_unit_rows(tmp_path):
    two = model()
    images, texts = two.encode_image(pictures()), two.encode_text(TEXTS)
    assert images.shape == texts.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(two.encode_text(TEXTS[0])[0], texts[0], atol=1e-6)
    np.testing.assert_allclose(two.encode_text(TEXTS, batch_size=2), texts, atol=1e-6)
    path = tmp_path / "x.png"
    Image.fromarray(pictures()[0]).save(path)
    np.testing.assert_allclose(two.encode_image(path)[0], images[0], atol=1e-6)
    similarity = two.similarity(images, texts)
    np.testing.assert_allclose(similarity, images @ texts.T, atol=1e-6)
    assert two.inverse_temperature == pytest.approx(10.0, rel=1e-6)
    assert two.encode_text([]).shape == (0, 8)
    np.testing.assert_allclose(two.encode_text(tuple(TEXTS[:2])), texts[:2], atol=1e-6)
    np.testing.assert_allclose(two.encode_image(jax.numpy.asarray(pictures())), images, atol=1e-6)
    nothing = {name: array[:0] for name, array in two.process_text(TEXTS).items()}
    assert two.encode("text", nothing).shape == (0, 8)


def test_inputs_that_a_tower_cannot_read_are_errors_in_words(tmp_path):
    two = model()
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        two.encode_text(TEXTS, batch_size=0)
    with pytest.raises(ValueError, match=r"text tower \(text\) reads tokens and mask, not tokens"):
        two.encode("text", {"tokens": np.zeros((1, 16), np.int32)})
    with pytest.raises(ValueError, match="reads pixels, not nothing"):
        two.encode("image", {})
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadExample, match=r"image unreadable: .*bad\.png"):
        two.encode_image([pictures()[0], tmp_path / "bad.png"], batch_size=1)
    with pytest.raises(BadExample, match="item 2: none of"):
        two.encode_image([*pictures()[:2], b"no picture"], batch_size=2)


def test_a_precomputed_tower_takes_arrays_only():
    vectors = TowerConfig("precomputed", overrides={"width": 6})
    two = model(image=vectors, text=TEXT)
    vectors = np.ones((3, 6), np.float32)
    assert two.encode("image", {"features": vectors}).shape == (3, 8)
    np.testing.assert_array_equal(
        two.encode_items("image", list(vectors)), two.encode("image", {"features": vectors})
    )
    assert two.encode_items("image", vectors[0]).shape == (1, 8)
    with pytest.raises(ValueError, match="the model has no image tower"):
        two.encode_image(pictures())


def test_recordings_of_any_rate_and_channels_are_encoded():
    pytest.importorskip("soxr")
    two = model(speech=SPEECH, text=TEXT)
    tone = 0.3 * np.sin(np.arange(8000) * 0.2).astype(np.float32)
    whole = two.encode_speech((tone, 16000))
    stereo = two.encode_speech((np.stack([tone, tone], axis=1), 16000))
    np.testing.assert_allclose(whole, stereo, atol=1e-5)
    integers = two.encode_speech((np.rint(tone * 32767).astype(np.int16), 16000))
    np.testing.assert_allclose(whole, integers, atol=1e-5)
    assert two.encode_speech((tone[:2000], 8000)).shape == (1, 8)


def test_exported_folder_loads_to_the_same_model(tmp_path):
    two = model()
    save_folder(tmp_path, two.description, two.leaves)
    again = cwcl_jax.load_model(tmp_path)
    assert again.description.towers["image"] == IMAGE
    np.testing.assert_array_equal(again.encode_text(TEXTS), two.encode_text(TEXTS))
    assert again.inverse_temperature == two.inverse_temperature


def test_what_is_not_a_model_is_an_error_with_a_remedy(tmp_path):
    two = model()
    with pytest.raises(FileNotFoundError, match=r"does not exist.*workdir of a run"):
        cwcl_jax.load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        cwcl_jax.load_model(tmp_path)
    with pytest.raises(ValueError, match="no speech tower; it has image and text"):
        two.encode_speech((np.zeros(10, np.int16), 16000))
    with pytest.raises(ValueError, match=r"uint8 \(y, x, 3\), not float64"):
        two.encode_image(np.zeros((16, 16, 3)))
    leaves = {path: leaf for path, leaf in two.leaves.items() if "head" not in path}
    save_folder(tmp_path, two.description, leaves)
    with pytest.raises(WeightsMismatch) as caught:
        cwcl_jax.load_model(tmp_path)
    assert len(caught.value.missing) == 2
    (tmp_path / "cwcl_jax.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cwcl_jax.json: not a description"):
        cwcl_jax.load_model(tmp_path)


def test_a_tokenizer_with_too_many_tokens_is_refused():
    small = TowerConfig("text", "tiny", dict(TEXT.overrides) | {"vocab_size": 10})
    with pytest.raises(ValueError, match=r"tokenizer='' has \d+ tokens.*table 10"):
        model(image=IMAGE, text=small)


def test_a_runs_workdir_loads_to_the_model_that_was_trained(tmp_path):
    from cwcl_jax.cli import DONE
    from cwcl_jax.training.encode import load_encoder
    from cwcl_jax.training.run import train
    from tests.training.toy import toy_config

    config = toy_config(**{"total_steps": 2, "evaluation.tasks": {}})
    assert train(config, tmp_path / "run") == DONE
    trained = cwcl_jax.load_model(tmp_path / "run")
    assert trained.description.origin["step"] == 2
    encoder, _ = load_encoder(tmp_path / "run")
    inputs = trained.process_text(TEXTS)
    expected = encoder.encode("text", inputs)
    np.testing.assert_allclose(trained.encode("text", inputs), expected, atol=1e-6)
    save_folder(tmp_path / "exported", trained.description, trained.leaves)
    again = cwcl_jax.load_model(tmp_path / "exported")
    np.testing.assert_allclose(again.encode_text(TEXTS), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"is an exported model.*leave out step=2"):
        cwcl_jax.load_model(tmp_path / "exported", step=2)


def test_a_tower_without_preset_is_trained_and_exported_with_its_folders_sizes(tmp_path):
    from cwcl_jax.cli import DONE
    from cwcl_jax.config import defaults
    from cwcl_jax.training.run import train
    from tests.training.toy import toy_config

    source = model()
    folder = tmp_path / "vit"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", source.leaves)
    theirs = ("image_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(theirs, (16, 16, 2, 2), strict=True)) | {"intermediate_size": 24}
    sizes |= {"model_type": "vit", "patch_size": 8, "hidden_act": "gelu_pytorch_tanh"}
    (folder / "config.json").write_text(json.dumps(sizes))
    tower = defaults(TowerConfig, encoder="vit", weights=str(folder), tune="head", head="linear")
    config = toy_config(
        **{"total_steps": 1, "evaluation.tasks": {}, "towers.image": tower, "data.image.size": 16}
    )
    assert train(config, tmp_path / "run") == DONE
    trained = cwcl_jax.load_model(tmp_path / "run")
    save_folder(tmp_path / "exported", trained.description, trained.leaves)
    again = cwcl_jax.load_model(tmp_path / "exported")
    assert again.leaves["towers/image/encoder/norm/scale"].shape == (16,)
    expected = trained.encode_image(pictures())
    np.testing.assert_allclose(again.encode_image(pictures()), expected, atol=1e-6)


def test_texts_that_are_cut_are_told():
    with pytest.warns(UserWarning, match="1 of 2 items are cut at max_tokens=16"):
        model().encode_text(["a star", "a red circle and a star" + " and a ring" * 6])


def test_items_that_cannot_be_read_may_be_left_out_by_rows_of_nan():
    two, good = model(), pictures()
    with pytest.warns(UserWarning, match="1 of 3 items cannot be used .*item 1: "):
        rows = two.encode_image([good[0], b"no picture", good[1]], batch_size=2, errors="skip")
    assert np.isnan(rows[1]).all()
    np.testing.assert_allclose(rows[[0, 2]], two.encode_image(good[:2]), atol=1e-6)
    with pytest.raises(ValueError, match="errors='ignore' must be 'raise' or 'skip'"):
        two.encode_image(good, errors="ignore")


def test_embeddings_on_disk_come_back_with_their_ids(tmp_path):
    description = EmbeddingDescription("image", (2,), "float16", 3, "source", "weights")
    vectors = np.array([[1, 0], [0, 1], [3, 4]], np.float32)
    writer = EmbeddingWriter(tmp_path, description)
    writer.write(range(3), ["a", "b", "c"], [vectors[0], vectors[:0], vectors[2]])
    ids, rows = cwcl_jax.load_embeddings(tmp_path)
    assert ids == ["a", "b", "c"]
    np.testing.assert_array_equal(rows[[0, 2]], vectors[[0, 2]])
    assert np.isnan(rows[1]).all()
