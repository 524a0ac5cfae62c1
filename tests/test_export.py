"""Exports give what they were made from: to other libraries' classes and back through ours."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest

from cwcl_jax.api import Model, load_model
from cwcl_jax.export import export, main
from cwcl_jax.modalities import ImageInputs, TextInputs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import import_tower
from cwcl_jax.pretrained.folder import save_folder
from tests.modalities.test_text import byte_pairs, word_pieces
from tests.models.builders import filled
from tests.test_api import IMAGE, TEXTS, model, pictures

SIZES = {"vocab_size": 2048, "max_tokens": 20, "width": 16, "depth": 2, "heads": 2, "mlp_width": 24}
NO_BIAS = dataclasses.replace(IMAGE, overrides={**IMAGE.overrides, "qkv_bias": False})
TEXT_TOWERS = {
    "bert-pooler": TowerConfig("bert", overrides=SIZES, pooling="pooler"),
    "bert-cls": TowerConfig("bert", overrides=SIZES, pooling="cls"),
    "roberta-cls": TowerConfig("roberta", overrides=SIZES, pooling="cls"),
    "text-cls": TowerConfig("text", overrides=SIZES | {"activation": "gelu_tanh"}, pooling="cls"),
}


def changed(two, **inputs):
    """The same leaves with other inputs."""
    new = dataclasses.replace(two.description, inputs={**two.description.inputs, **inputs})
    return Model(two.description.abstract()[0], two.leaves, new)


@pytest.mark.parametrize("name", [*TEXT_TOWERS, "without biases"])
def test_vision_text_dual_encoder_gives_equal_outputs(tmp_path, name):
    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    image = NO_BIAS if name == "without biases" else IMAGE
    two = model(image=image, text=TEXT_TOWERS.get(name, TEXT_TOWERS["text-cls"]))
    export(two, tmp_path, "transformers")
    theirs = transformers.VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    tokens = two.process_text(TEXTS)
    if name.startswith("roberta"):  # it counts positions by its padding id, 1
        tokens["tokens"] = np.where(tokens["mask"], np.maximum(tokens["tokens"], 2), 1)
    pixels = two.process_image(pictures())
    values = (pixels["pixels"].astype(np.float32) - 127.5) / 127.5
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor(tokens["tokens"]),
            attention_mask=torch.tensor(tokens["mask"].astype(np.int64)),
            pixel_values=torch.tensor(values).permute(0, 3, 1, 2),
        )
    images, texts = two.encode("image", pixels), two.encode("text", tokens)
    np.testing.assert_allclose(images, out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(texts, out.text_embeds.numpy(), atol=1e-5)
    logits = two.inverse_temperature * two.similarity(images, texts)
    np.testing.assert_allclose(logits, out.logits_per_image.numpy(), atol=1e-4)  # 10 x cosines


def test_exported_processors_prepare_the_same_inputs(tmp_path):
    pytest.importorskip("torch")
    import transformers

    two = model(image=IMAGE, text=TEXT_TOWERS["text-cls"])
    export(two, tmp_path, "transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True)
    ours = two.process_text(TEXTS)
    np.testing.assert_array_equal(ours["tokens"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["mask"], np.array(theirs["attention_mask"], bool))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    values = processor(images=pictures(), return_tensors="np")["pixel_values"]
    expected = (two.process_image(pictures())["pixels"].astype(np.float32) - 127.5) / 127.5
    np.testing.assert_allclose(values.transpose(0, 2, 3, 1), expected, atol=1e-5)


def test_exported_image_processor_cuts_the_centre_as_ours_does(tmp_path):
    pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    rng = np.random.default_rng(0)
    shapes = {0: [(16, 64, 3), (48, 16, 3)], 24: [(24, 64, 3), (40, 24, 3)]}
    for resize, sizes in shapes.items():
        two = model(image=IMAGE, text=TEXT_TOWERS["text-cls"])
        two = changed(two, image=ImageInputs(size=16, eval_resize=resize))
        export(two, tmp_path / str(resize), "transformers")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / str(resize))
        for size in sizes:
            picture = rng.integers(0, 256, size, np.uint8)
            values = processor(images=[picture], return_tensors="np")["pixel_values"]
            expected = (two.process_image(picture)["pixels"].astype(np.float32) - 127.5) / 127.5
            np.testing.assert_allclose(values.transpose(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("made", [byte_pairs, word_pieces])
def test_every_format_brings_the_tokenizer_wherever_it_comes_from(tmp_path, monkeypatch, made):
    transformers = pytest.importorskip("transformers")
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    made(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    texts = ["red star", "a star", " ".join(["red"] * 30)]
    two = model(image=IMAGE, text=TEXT_TOWERS["bert-cls"])
    for number, name in enumerate(("installed:some_package/model", str(package / "model"))):
        named = changed(two, text=TextInputs(tokenizer=name, max_tokens=12))
        expected = named.process_text(texts)["tokens"]
        assert len({tuple(row) for row in expected}) == 3
        own, theirs = tmp_path / f"own{number}", tmp_path / f"theirs{number}"
        export(named, own, "safetensors")
        export(named, theirs, "transformers")
        again = load_model(own)
        assert str(again.description.inputs["text"].tokenizer).startswith(str(own))
        np.testing.assert_array_equal(again.process_text(texts)["tokens"], expected)
        with pytest.warns(UserWarning, match="1 of 3 items are cut at max_tokens=12"):
            found, wanted = again.encode_text(texts), named.encode_text(texts)
        np.testing.assert_array_equal(found, wanted)
        tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
        ids = tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
        np.testing.assert_array_equal(ids, expected)


def test_what_belongs_to_the_machine_of_the_training_is_not_exported(tmp_path):
    two = model(image=dataclasses.replace(IMAGE, attention="cudnn"), text=TEXT_TOWERS["text-cls"])
    save_folder(tmp_path, two.description, two.leaves)
    written = json.loads((tmp_path / "cwcl_jax.json").read_text())
    assert written["towers"]["image"]["attention"] == "auto"
    assert load_model(tmp_path).encode_image(pictures()).shape == (3, 8)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"text": {"pooling": "mean"}}, "pooling='cls'"),
        ({"text": {"head": "mlp"}}, "head='linear'"),
        ({"image": {"pooling": "mean"}}, "ViT with pooling='cls'"),
    ],
)
def test_what_transformers_cannot_express_is_refused_with_the_remedy(tmp_path, towers, message):
    configs = {"image": IMAGE, "text": TEXT_TOWERS["text-cls"]}
    for modality, changes in towers.items():
        configs[modality] = dataclasses.replace(configs[modality], **changes)
    with pytest.raises(ValueError, match=message):
        export(model(**configs), tmp_path / "out", "transformers")
    assert not (tmp_path / "out").exists()


def test_npz_and_safetensors_are_sources_of_weights_for_another_tower(tmp_path):
    two = model()
    export(two, tmp_path / "image.npz", "npz")
    export(two, tmp_path / "folder", "safetensors")
    for weights in (tmp_path / "image.npz", tmp_path / "folder"):
        config = dataclasses.replace(IMAGE, weights=str(weights))
        imported = import_tower(config, "image", two.leaves)
        assert imported.initialised == ()
        for path, leaf in imported.leaves.items():
            np.testing.assert_array_equal(leaf, two.leaves[path])


def test_npz_of_a_tower_without_biases_is_the_same_function(tmp_path):
    two = model(image=NO_BIAS, text=TEXT_TOWERS["bert-cls"])
    export(two, tmp_path / "image.npz", "npz")
    with_biases = model(image=IMAGE, text=TEXT_TOWERS["bert-cls"])
    config = dataclasses.replace(IMAGE, weights=str(tmp_path / "image.npz"))
    imported = import_tower(config, "image", with_biases.leaves)
    definition = with_biases.description.abstract()[0]
    again = Model(definition, with_biases.leaves | imported.leaves, with_biases.description)
    expected = two.encode_image(pictures())
    np.testing.assert_allclose(again.encode_image(pictures()), expected, atol=1e-6)


def test_npz_refuses_a_head_that_its_layout_does_not_have(tmp_path):
    two = model(image=dataclasses.replace(IMAGE, head="mlp"), text=TEXT_TOWERS["text-cls"])
    with pytest.raises(ValueError, match=r"head='mlp'.*export it as safetensors"):
        export(two, tmp_path / "image.npz", "npz")
    assert not (tmp_path / "image.npz").exists()


@pytest.mark.parametrize("form", ["npz", "transformers"])
def test_a_norm_before_the_blocks_is_not_left_out_without_a_word(tmp_path, form):
    two = model(image=IMAGE, text=TEXT_TOWERS["text-cls"])
    two.leaves["towers/image/encoder/embedding_norm/scale"] = jax.numpy.ones(16)
    with pytest.raises(ValueError, match=r"norm between embeddings and blocks.*as\s?safetensors"):
        export(two, tmp_path / "x.npz", form)
    assert not (tmp_path / "x.npz").exists()


def test_scanned_and_half_precision_models_export_the_same_numbers(tmp_path):
    image = dataclasses.replace(IMAGE, scan_layers=True)
    base = model(image=image, text=TEXT_TOWERS["bert-cls"])
    halves = {p: x.astype("bfloat16") if "/image/" in p else x for p, x in base.leaves.items()}
    two = Model(base.description.abstract()[0], halves, base.description)
    save_folder(tmp_path / "own", two.description, halves)
    again = load_model(tmp_path / "own")
    for path, leaf in halves.items():
        assert again.leaves[path].dtype == leaf.dtype
        np.testing.assert_array_equal(again.leaves[path], leaf)
    export(two, tmp_path / "image.npz", "npz")
    config = dataclasses.replace(IMAGE, weights=str(tmp_path / "image.npz"))
    _, shapes = dataclasses.replace(
        base.description, towers={"image": config, "text": base.description.towers["text"]}
    ).abstract()
    imported = import_tower(config, "image", filled(shapes))
    one = imported.leaves["towers/image/encoder/blocks/1/mlp/up/kernel"]
    stacked = halves["towers/image/encoder/blocks/mlp/up/kernel"]
    np.testing.assert_array_equal(one, stacked[1].astype(jax.numpy.float32))


def test_command_line_exports_and_reports_errors_in_one_line(tmp_path, capsys):
    two = model()
    save_folder(tmp_path / "own", two.description, two.leaves)
    source = f"--source={tmp_path / 'own'}"
    assert main([source, "--format=npz", f"--output={tmp_path / 'x.npz'}"]) == 0
    assert (tmp_path / "x.npz").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    for place, words in (("notes", "holds files of something else.*README.md"), ("x.npz", "file")):
        assert main([source, f"--output={tmp_path / place}"]) == 2
        assert re.search(words, capsys.readouterr().err)
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"
    assert [main([source, f"--output={tmp_path / 'again'}"]) for _ in range(2)] == [0, 0]
    assert main([source, "--format=transformers", f"--output={tmp_path / 'y'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the text tower (text, pooling 'mean') does not fit")
    assert main([source]) == 2
    assert "arguments are required: --output" in capsys.readouterr().err


def test_damaged_weights_of_an_export_are_refused(tmp_path):
    two = model()
    save_folder(tmp_path / "own", two.description, two.leaves)
    file = tmp_path / "own" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or was changed"):
        load_model(tmp_path / "own")


def test_onnx_files_give_equal_embeds_at_any_batch_size(tmp_path):
    pytest.importorskip("jax2onnx", reason="pip install --no-deps jax2onnx onnx onnx-ir")
    runtime = pytest.importorskip("onnxruntime")
    two = model()
    export(two, tmp_path, "onnx")
    for modality, inputs in (
        ("image", two.process_image(pictures(5))),
        ("text", two.process_text(TEXTS)),
    ):
        session = runtime.InferenceSession(tmp_path / f"{modality}.onnx")
        for count in (1, len(next(iter(inputs.values())))):
            part = {name: array[:count] for name, array in inputs.items()}
            (embeds,) = session.run(["embeds"], part)
            np.testing.assert_allclose(embeds, two.encode(modality, part), atol=1e-5)


def test_onnx_without_its_library_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ValueError, match=r"needs jax2onnx.*pip install --no-deps"):
        export(model(), tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
