"""Both towers of a CLIP folder compute what transformers' PyTorch classes compute, at 1e-5.

The references are tiny, random, and saved by transformers itself; nothing is downloaded.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.api import load_model
from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete, import_tower
from tests.models.builders import one_tower
from tests.pretrained.test_image_towers import write_tokenizer
from tests.pretrained.test_parity import randomise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 36}
TEXT = SIZES | {"vocab_size": 40, "hidden_size": 24, "max_position_embeddings": 9}
VISION = SIZES | {"hidden_size": 16, "image_size": 16, "patch_size": 4}
PROJECTED = 8
END = 39
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def clip(folder, kind="CLIPModel", act="quick_gelu", end=END):
    """A random CLIP of one of transformers' classes, saved in `folder`."""
    text, vision = TEXT | {"hidden_act": act, "eos_token_id": end}, VISION | {"hidden_act": act}
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(
            text_config=text, vision_config=vision, projection_dim=PROJECTED
        )
    elif "Text" in kind:
        config = transformers.CLIPTextConfig(**text, projection_dim=PROJECTED)
    else:
        config = transformers.CLIPVisionConfig(**vision, projection_dim=PROJECTED)
    model = randomise(getattr(transformers, kind)(config))
    model.save_pretrained(folder)
    return model


def imported(encoder, folder, embed_dim=PROJECTED, **changes):
    """The tower with a folder's own settings and weights, and the import's account."""
    config = complete(TowerConfig(encoder, weights=str(folder), **changes))
    definition, shapes = one_tower(config, embed_dim=embed_dim)
    result = import_tower(config, "x", {f"towers/x/{path}": leaf for path, leaf in shapes.items()})
    leaves = {path.removeprefix("towers/x/"): leaf for path, leaf in result.leaves.items()}
    missing = {path: shapes[path] for path in shapes if path not in leaves}
    return definition.merge(leaves | missing), result


def texts(lengths=(9, 5, 3), end=END):
    """Texts that end with the end token and are padded with it, as CLIP's tokenizers do."""
    tokens = RNG.integers(3, 38, (len(lengths), 9))
    mask = np.arange(9)[None, :] < np.asarray(lengths)[:, None]
    tokens[np.arange(len(lengths)), np.asarray(lengths) - 1] = end
    return np.where(mask, tokens, end), mask


def pictures():
    """Pixels, and the values that CLIP's image processor makes of them."""
    pixels = RNG.integers(0, 256, (2, 16, 16, 3), np.uint8)
    values = transformers.CLIPImageProcessor(
        do_resize=False, do_center_crop=False, do_convert_rgb=False
    )(list(pixels), return_tensors="pt", input_data_format="channels_last")
    return {"pixels": jnp.asarray(pixels)}, values["pixel_values"]


def run(function, *arguments):
    return np.asarray(jax.jit(function)(*arguments))


def unit(x):
    x = x.numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def check_text(folder, towers_model, project, *, end=END, **changes):
    tokens, mask = texts(end=max(end, END))
    with torch.no_grad():
        out = towers_model(
            input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))
        )
        expected = project(out.pooler_output)
    tower, result = imported("text", folder, **changes)
    inputs = {"tokens": jnp.asarray(tokens, jnp.int32), "mask": jnp.asarray(mask)}
    sequence = run(tower.encoder.tokens, inputs)
    np.testing.assert_allclose(sequence[mask], out.last_hidden_state.numpy()[mask], atol=1e-5)
    np.testing.assert_allclose(run(tower.features, inputs), out.pooler_output.numpy(), atol=1e-5)
    np.testing.assert_allclose(run(tower, inputs), unit(expected), atol=1e-5)
    # The text ends where its end token stands, also for a caller that masks nothing.
    blind = inputs | {"mask": jnp.ones_like(inputs["mask"])}
    np.testing.assert_allclose(run(tower, blind), unit(expected), atol=1e-5)
    assert result.initialised == ()
    return result


def check_image(folder, towers_model, project, **changes):
    inputs, values = pictures()
    with torch.no_grad():
        out = towers_model(pixel_values=values, output_hidden_states=True)
        expected = project(out.pooler_output)
        final = towers_model.post_layernorm(out.last_hidden_state).numpy()
    tower, result = imported("vit", folder, **changes)
    embedded = run(tower.encoder.embed, inputs["pixels"])
    np.testing.assert_allclose(embedded, out.hidden_states[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(run(tower.encoder.tokens, inputs), final, atol=1e-5)
    np.testing.assert_allclose(run(tower.features, inputs), out.pooler_output.numpy(), atol=1e-5)
    np.testing.assert_allclose(run(tower, inputs), unit(expected), atol=1e-5)
    assert result.initialised == ()
    return result


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_both_towers_of_a_joint_folder_equal_pytorch(tmp_path, act):
    model = clip(tmp_path, act=act)
    text = check_text(tmp_path, model.text_model, model.text_projection)
    image = check_image(tmp_path, model.vision_model, model.visual_projection)
    assert all(name.startswith(("vision_model/", "visual_pro", "logit_s")) for name in text.ignored)
    assert all(name.startswith(("text_model/", "text_pro", "logit_s")) for name in image.ignored)


def test_towers_saved_alone_equal_pytorch(tmp_path):
    text = clip(tmp_path / "text", "CLIPTextModelWithProjection")
    image = clip(tmp_path / "image", "CLIPVisionModelWithProjection")
    assert check_text(tmp_path / "text", text.text_model, text.text_projection).ignored == ()
    result = check_image(tmp_path / "image", image.vision_model, image.visual_projection)
    assert result.ignored == ()


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPVisionModel"])
def test_towers_without_a_projection_start_with_a_new_head(tmp_path, kind):
    clip(tmp_path, kind)
    _, result = imported("text" if "Text" in kind else "vit", tmp_path)
    assert result.initialised == ("towers/x/head/projection/kernel",)
    assert result.ignored == ()


def test_the_highest_id_ends_a_text_of_an_old_file(tmp_path):
    model = clip(tmp_path, end=2)
    check_text(tmp_path, model.text_model, model.text_projection, end=2)


def test_scanned_layers_and_a_head_of_another_width(tmp_path):
    model = clip(tmp_path)
    check_text(tmp_path, model.text_model, model.text_projection, scan_layers=True)
    check_image(tmp_path, model.vision_model, model.visual_projection, scan_layers=True)
    _, result = imported("text", tmp_path, embed_dim=PROJECTED + 1)
    assert result.initialised == ("towers/x/head/projection/kernel",)
    assert "text_projection/kernel" in result.ignored


def test_sizes_are_those_of_the_towers_part_and_old_files_are_read_as_transformers_does(tmp_path):
    def settings(encoder):
        config = complete(TowerConfig(encoder, weights=str(tmp_path)))
        return encoder_config(encoder, "", config.overrides, config.pooling)

    text = {"hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu"}
    vision = {"patch_size": 14, "image_size": [336, 336]}
    content = {"model_type": "clip", "text_config": {"hidden_size": 3}, "vision_config": vision}
    content["text_config_dict"] = text
    (tmp_path / "config.json").write_text(json.dumps(content))
    theirs = transformers.CLIPConfig.from_dict(content)
    ours = settings("text"), settings("vit")
    for one, other in zip(ours, (theirs.text_config, theirs.vision_config), strict=True):
        assert one.width == other.hidden_size
        assert (one.depth, one.heads) == (other.num_hidden_layers, other.num_attention_heads)
        assert (one.mlp_width, one.epsilon) == (other.intermediate_size, other.layer_norm_eps)
    assert ours[0].activation == "gelu_erf"
    assert ours[1].activation == "quick_gelu"
    assert ours[0].end_token == theirs.text_config.eos_token_id
    assert (ours[0].causal, ours[0].vocab_size, ours[0].max_tokens) == (True, 49408, 77)
    assert (ours[1].image_size, ours[1].patch_size) == (336, 14)


def test_presets_have_the_sizes_and_pixels_that_transformers_takes_for_granted():
    vision = encoder_config("vit", "CLIP-ViT-B/32", {}, "")
    processor = transformers.CLIPImageProcessor()
    np.testing.assert_allclose(vision.pixel_mean, 255 * np.array(processor.image_mean), atol=1e-6)
    np.testing.assert_allclose(vision.pixel_std, 255 * np.array(processor.image_std), atol=1e-6)
    for config, settings in (
        (transformers.CLIPVisionConfig(), vision),
        (transformers.CLIPTextConfig(), encoder_config("text", "CLIP-B", {}, "")),
    ):
        assert (config.hidden_size, config.intermediate_size) == (
            settings.width,
            settings.mlp_width,
        )
        assert (config.num_hidden_layers, config.layer_norm_eps) == (
            settings.depth,
            settings.epsilon,
        )
        assert (config.num_attention_heads, config.hidden_act) == (settings.heads, "quick_gelu")


def test_a_tower_of_another_kind_is_named(tmp_path):
    clip(tmp_path)
    for encoder, reader in (("bert", "text"), ("dinov2", "vit"), ("siglip_text", "text")):
        config = TowerConfig(encoder, weights=str(tmp_path))
        with pytest.raises(WeightsMismatch, match=rf"is a clip.*encoder to '{reader}'"):
            import_tower(config, "x", {})
    # Without config.json the names of the arrays tell.
    (tmp_path / "config.json").rename(tmp_path / "kept")
    for encoder, expected in (("bert", "CLIP text file.*'text'"), ("whisper", "CLIP image file")):
        config = TowerConfig(encoder, "tiny", weights=str(tmp_path))
        with pytest.raises(WeightsMismatch, match=rf"looks like a {expected}"):
            import_tower(config, "x", {})
    (tmp_path / "kept").rename(tmp_path / "config.json")
    # Every token sees every other in the preset "B"; in CLIP's tower it does not.
    config = complete(TowerConfig("text", weights=str(tmp_path), overrides={"causal": False}))
    _, shapes = one_tower(config)
    with pytest.raises(WeightsMismatch, match=r"config.json has causal=True.*overrides"):
        import_tower(config, "x", {f"towers/x/{path}": leaf for path, leaf in shapes.items()})


def test_a_clip_folder_is_a_model_without_a_run(tmp_path):
    """Cosines and scale are those of transformers' own model."""
    reference = clip(tmp_path)
    with pytest.raises(ValueError, match=r"The folder tokenizer=.* has no tokenizer"):
        load_model(tmp_path)
    write_tokenizer(tmp_path)
    ours = load_model(tmp_path)
    pixels = RNG.integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    tokens = np.concatenate([RNG.integers(1, 38, (3, 5)), np.full((3, 1), END)], axis=1)
    mean, std = (np.asarray(x) for x in clip_range())
    plain = ((pixels - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.tensor(tokens), pixel_values=torch.tensor(plain, dtype=torch.float32)
        )
    images = ours.encode("image", {"pixels": pixels})
    mask = np.ones_like(tokens, bool)
    texts = ours.encode("text", {"tokens": tokens.astype(np.int32), "mask": mask})
    logits = ours.inverse_temperature * ours.similarity(images, texts)
    np.testing.assert_allclose(logits, theirs.logits_per_image.numpy(), atol=1e-4)


def clip_range():
    settings = encoder_config("vit", "CLIP-ViT-B/32", {}, "")
    return settings.pixel_mean, settings.pixel_std
