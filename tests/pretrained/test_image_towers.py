"""SigLIP, DINOv2 and DINOv3 compute what transformers' PyTorch classes compute, at 1e-5."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from cwcl_jax.api import load_model
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import complete
from cwcl_jax.training import sharding
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.weights.rules import TRANSFORMS
from tests.pretrained.against_torch import (
    close,
    imported,
    jitted,
    saved,
    torch,
    transformers,
    unit,
)
from tests.training.toy import toy_config

RNG = np.random.default_rng(0)
# Two shapes: 3 x 3 patches of 4, and 2 x 2 patches of 6.
SHAPES = [
    {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
     "patch_size": 4},
    {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 12,
     "patch_size": 6},
]  # fmt: skip


def pictures(size):
    return RNG.integers(0, 256, (2, size, size, 3), np.uint8)


def values(pixels, settings):
    """The pixels as PyTorch's classes take them, in the tower's own range."""
    mean, std = np.asarray(settings.pixel_mean), np.asarray(settings.pixel_std)
    plain = ((pixels - mean) / std).transpose(0, 3, 1, 2)
    return torch.tensor(plain, dtype=torch.float32)


def image_outputs(tower, pixels):
    def run(inputs):
        return {
            "embedded": tower.encoder.embed(inputs["pixels"]),
            "tokens": tower.encoder.tokens(inputs),
            "features": tower.features(inputs),
            "embeds": tower(inputs),
        }

    return jitted(run, {"pixels": jnp.asarray(pixels)})


def siglip(folder, shape, **text):
    sizes = {"hidden_size": shape["hidden_size"], "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 40, "intermediate_size": 20, "max_position_embeddings": 7} | text
    config = transformers.SiglipConfig(
        text_config=text, vision_config=shape | {"intermediate_size": 28}
    )
    return saved(transformers.SiglipModel(config), folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_siglips_image_tower_equals_pytorch(tmp_path, shape):
    model = siglip(tmp_path, shape)
    tower, result = imported("siglip", tmp_path, shape["hidden_size"])
    pixels = pictures(12)
    with torch.no_grad():
        vision = model.vision_model
        out = vision(values(pixels, tower.encoder.config), output_hidden_states=True)
    ours = image_outputs(tower, pixels)
    close("siglip", ours["embedded"], out.hidden_states[0])
    close("siglip", ours["tokens"], out.last_hidden_state)
    close("siglip", ours["features"], out.pooler_output)
    close("siglip", ours["embeds"], unit(out.pooler_output))
    assert all(name.startswith(("text_model/", "logit_")) for name in result.ignored)


@pytest.mark.parametrize("projection", [0, 10])
def test_siglips_text_tower_reads_its_padding_as_pytorch_does(tmp_path, projection):
    text = {"projection_size": projection} if projection else {}
    model = siglip(tmp_path, SHAPES[0], **text)
    tower, result = imported("siglip_text", tmp_path, projection or 24)
    lengths = np.array([5, 3, 1])
    real = np.arange(7)[None] < lengths[:, None]
    tokens = np.where(real, RNG.integers(3, 40, (3, 7)), 1)
    with torch.no_grad():
        out = model.text_model(input_ids=torch.tensor(tokens))

    def run(inputs):
        padded, mask = tower.encoder.padded(inputs["tokens"], inputs["mask"])
        sequence = tower.encoder.tokens({"tokens": padded, "mask": mask})
        return sequence, tower.features(inputs), tower(inputs)

    # Cut to its longest text, as batches are, and with another id behind each text.
    inputs = {
        "tokens": jnp.asarray(np.where(real, tokens, 0)[:, :5], jnp.int32),
        "mask": jnp.asarray(real[:, :5]),
    }
    sequence, features, embeds = jitted(run, inputs)
    close("siglip_text", sequence, out.last_hidden_state)
    close("siglip_text", features, out.pooler_output)
    close("siglip_text", embeds, unit(out.pooler_output))
    assert all(name.startswith(("vision_model/", "logit_")) for name in result.ignored)


def write_tokenizer(folder):
    """Words w2 to w39 by their numbers; </s>, number 1, is the padding, as SigLIP's is."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 40)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_a_siglip_folder_is_a_model_with_scale_and_bias(tmp_path):
    reference = siglip(tmp_path, SHAPES[0])
    write_tokenizer(tmp_path)
    ours = load_model(tmp_path)
    image, text = (ours.description.towers[x].encoder_settings() for x in ("image", "text"))
    pixels = pictures(12)
    # As the library's processor pads them: to the last place.
    tokens = np.array([[5, 9, 30, 1, 1, 1, 1], [7, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        theirs = reference(
            input_ids=torch.tensor(tokens), pixel_values=values(pixels, image)
        ).logits_per_image
    cosines = ours.similarity(
        ours.encode_image(list(pixels)), ours.encode_text(["w5 w9 w30", "w7"])
    )
    logits = ours.inverse_temperature * cosines + float(ours.leaves["logit_bias"])
    np.testing.assert_allclose(logits, theirs.numpy(), atol=1e-5)
    other = dataclasses.replace(text, pad_token=0)
    with pytest.raises(ValueError, match=r"id 0, and the tokenizer .* pads with 1"):
        ours.description.inputs["text"].check(other, options="x", overrides="y", imported=True)


def test_a_run_with_the_sigmoid_loss_begins_with_the_scale_and_bias_of_its_siglip(tmp_path):
    reference = siglip(tmp_path, SHAPES[0])
    write_tokenizer(tmp_path)
    towers = {
        name: TowerConfig(encoder, weights=str(tmp_path), head="none")
        for name, encoder in (("image", "siglip"), ("text", "siglip_text"))
    }
    changes = {"loss.name": "sigmoid", "embed_dim": 24, "data.image.size": 12}
    changes |= {"data.text.max_tokens": 7, "data.text.tokenizer": str(tmp_path)}

    def begun(**more):
        config = dataclasses.replace(toy_config(**changes, **more), towers=towers)
        state, _, _ = initialise(make_blueprint(config, sharding.make_mesh(config.mesh)))
        return float(state.params["logit_scale"]), float(state.params["logit_bias"])

    saved_ones = (reference.logit_scale.item(), reference.logit_bias.item())
    assert begun() == pytest.approx(saved_ones)
    fresh = toy_config().temperature
    assert begun(**{"temperature.from_weights": False}) == pytest.approx(
        (np.log(fresh.initial), fresh.bias)
    )


def test_the_second_siglips_padding_and_any_shape_are_told(tmp_path):
    content = {"model_type": "siglip", "text_config": {"vocab_size": 256000}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = complete(TowerConfig("siglip_text", weights=str(tmp_path)))
    assert config.encoder_settings().pad_token == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match="NaFlex"):
        complete(TowerConfig("siglip", weights=str(tmp_path)))


@pytest.mark.parametrize(("old", "new"), [(37, 16), (5, 8), (7, 7), (6, 4)])
@pytest.mark.parametrize("antialias", [False, True])
def test_position_grids_are_resized_as_pytorch_does(old, new, antialias):
    table = RNG.normal(size=(1, 1 + old**2, 3)).astype(np.float32)
    grid = torch.tensor(table[:, 1:]).reshape(1, old, old, 3).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(
        grid, size=(new, new), mode="bicubic", align_corners=False, antialias=antialias
    )
    theirs = theirs.permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
    name = "bicubic_grid_antialias" if antialias else "bicubic_grid"
    ours = TRANSFORMS[name](table, (1, 1 + new**2, 3))
    np.testing.assert_array_equal(ours[:, :1], table[:, :1])
    np.testing.assert_allclose(ours[:, 1:], theirs, atol=2e-6)


def check_dino(name, encoder, model, folder, size, registers):
    width = model.config.hidden_size
    tower, result = imported(encoder, folder, width, overrides={"image_size": size})
    pixels = pictures(size)
    with torch.no_grad():
        out = model(values(pixels, tower.encoder.config), output_hidden_states=True)
    ours = image_outputs(tower, pixels)
    close(name, ours["embedded"], out.hidden_states[0])
    close(name, ours["tokens"], out.last_hidden_state)
    close(name, ours["features"], out.pooler_output)
    close(name, ours["embeds"], unit(out.pooler_output))
    mean, _ = imported(encoder, folder, width, overrides={"image_size": size}, pooling="mean")
    features = jitted(mean.features, {"pixels": jnp.asarray(pixels)})
    close(name, features, out.last_hidden_state[:, 1 + registers :].mean(1))
    assert all("mask_token" in ignored for ignored in result.ignored)


@pytest.mark.parametrize("size", [12, 24])
@pytest.mark.parametrize("kind", ["plain", "gated", "registers"])
def test_dinov2_equals_pytorch_at_its_own_and_at_another_size(tmp_path, kind, size):
    shape = SHAPES[0] if kind == "plain" else SHAPES[1]
    if kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=3)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        config = transformers.Dinov2Config(**shape, use_swiglu_ffn=kind == "gated")
        model = transformers.Dinov2Model(config)
    model = saved(model, tmp_path)
    check_dino("dinov2", "dinov2", model, tmp_path, size, 3 if kind == "registers" else 0)


@pytest.mark.parametrize(("shape", "gated"), [(SHAPES[0], False), (SHAPES[1], True)])
def test_dinov3_equals_pytorch(tmp_path, shape, gated):
    config = transformers.DINOv3ViTConfig(
        **shape, intermediate_size=20, use_gated_mlp=gated, num_register_tokens=2,
        hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    model = saved(transformers.DINOv3ViTModel(config), tmp_path)
    check_dino("dinov3", "dinov3", model, tmp_path, 12, 2)
