"""A pair of CLIP's kind leaves as transformers' CLIPModel, with processor, and comes back."""

import dataclasses

import numpy as np
import pytest

from cwcl_jax.api import Model, load_model
from cwcl_jax.export import export
from cwcl_jax.modalities import ImageInputs, TextInputs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained.folder import ModelDescription
from tests.models.builders import filled
from tests.test_api import IMAGE, TEXT, model, pictures

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "epsilon": 1e-5}
OF_IMAGE = SIZES | {"image_size": 16, "patch_size": 4, "patch_bias": False, "embedding_norm": True}
VISION = TowerConfig("vit", overrides=OF_IMAGE | {"activation": "quick_gelu"})
WORDS = TowerConfig(
    "text",
    overrides=SIZES | {"vocab_size": 2048, "max_tokens": 20, "causal": True},
    pooling="last",
)
TEXTS = ["a red star", "two blue circles and a green square", "star"]


def pair(image=VISION, text=WORDS, **changes):
    """A random model of two towers; its tokenizer's end token is 3."""
    towers = {"image": image, "text": text}
    inputs = {"image": ImageInputs(size=16, **changes), "text": TextInputs(max_tokens=16)}
    description = ModelDescription(towers, embed_dim=8, inputs=inputs)
    definition, shapes = description.abstract()
    return Model(
        definition, filled(shapes) | {"logit_scale": np.float32(np.log(10.0))}, description
    )


@pytest.mark.parametrize("pooling", ["last", "end"])
def test_clip_model_and_processor_give_equal_outputs(tmp_path, pooling):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    words = dataclasses.replace(WORDS, pooling=pooling)
    two = pair(text=words, image=dataclasses.replace(VISION, scan_layers=pooling == "end"))
    export(two, tmp_path, "clip")
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path)
    made = processor(text=TEXTS, images=pictures(), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = theirs.eval()(**made)
    images, texts = two.encode_image(pictures()), two.encode_text(TEXTS)
    np.testing.assert_allclose(images, out.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(texts, out.text_embeds.numpy(), atol=1e-5)
    logits = two.inverse_temperature * two.similarity(images, texts)
    np.testing.assert_allclose(logits, out.logits_per_image.numpy(), atol=1e-4)  # 10 x cosines
    again = load_model(tmp_path)
    np.testing.assert_allclose(again.encode_image(pictures()), images, atol=1e-5)
    np.testing.assert_allclose(again.encode_text(TEXTS), texts, atol=1e-5)
    assert again.inverse_temperature == pytest.approx(two.inverse_temperature)


@pytest.mark.parametrize("squash", [False, True])
def test_the_processor_prepares_pictures_as_the_inputs_do(tmp_path, squash):
    size = 0 if squash else 24
    two = pair(eval_resize=size, resample="bilinear", squash=squash)
    export(two, tmp_path, "clip")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    values = processor(images=[picture], return_tensors="np")["pixel_values"]
    expected = (two.process_image(picture)["pixels"].astype(np.float32) - 127.5) / 127.5
    np.testing.assert_allclose(values.transpose(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": IMAGE}, r"image tower is not of CLIP's kind, embedding_norm=False"),
        ({"text": TEXT}, r"text tower is not of CLIP's kind, causal=False"),
        ({"text": TowerConfig("bert", "tiny")}, r"text tower is a bert, and CLIPModel's a text"),
        ({"image": dataclasses.replace(VISION, head="mlp")}, r"head='mlp' \(CLIP: 'linear'\)"),
        ({"text": dataclasses.replace(WORDS, pooling="mean")}, r"text tower pools by 'mean'"),
    ],
)
def test_towers_of_another_kind_are_refused_with_what_differs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        export(pair(**changes), tmp_path / "out", "clip")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_text_tower_is_no_clip(tmp_path):
    speech = TowerConfig("conv_speech", "tiny", {"stem": [8, 8], "width": 8, "dilations": [1]})
    with pytest.raises(ValueError, match="one tower must read text for this format, and none does"):
        export(model(image=IMAGE, speech=speech), tmp_path, "clip")
