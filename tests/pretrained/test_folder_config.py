"""Sizes from a folder's config.json: taken without a preset, explained beside a wrong one."""

import dataclasses
import json

import pytest

from cwcl_jax.models.encoders import ENCODERS, encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete, import_tower
from cwcl_jax.pretrained.folder import ModelDescription, save_folder
from cwcl_jax.pretrained.folder_config import check_settings
from cwcl_jax.weights.failures import WrongSettings
from cwcl_jax.weights.writers import write_safetensors
from tests.models.builders import one_tower, two_towers
from tests.pretrained.test_readers import bert_arrays

CONFIG = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


def folder(path, **changes):
    write_safetensors(path / "model.safetensors", bert_arrays())
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(path)


def load(config):
    _, leaves = one_tower(config)
    return import_tower(config, "text", {f"towers/text/{p}": x for p, x in leaves.items()})


def test_a_folder_without_preset_gives_its_own_sizes(tmp_path):
    config = complete(TowerConfig("bert", weights=folder(tmp_path), pooling="mean"))
    assert len(load(config).leaves) == 5 + 16
    settings = encoder_config(config.encoder, config.preset, config.overrides, config.pooling)
    assert (settings.width, settings.epsilon, settings.pooling) == (8, 1e-12, "mean")
    deeper = TowerConfig("bert", weights=str(tmp_path), overrides={"dropout": 0.0, "depth": 2})
    assert complete(deeper).overrides["depth"] == 2


def test_a_preset_is_not_touched_and_a_wrong_one_explained(tmp_path):
    config = TowerConfig("bert", "tiny", weights=folder(tmp_path))
    assert complete(config) is config
    with pytest.raises(WeightsMismatch, match=r"config.json has width=8, depth=1.*empty preset"):
        load(config)


def test_a_preset_that_fits_is_named(tmp_path):
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    base |= {"intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512}
    config = TowerConfig("bert", "tiny", weights=folder(tmp_path, **base))
    with pytest.raises(WeightsMismatch, match="preset 'BERT-base' fits"):
        load(config)


def test_position_offset_and_other_model_types(tmp_path):
    path = folder(tmp_path, model_type="xlm-roberta", max_position_embeddings=514)
    assert complete(TowerConfig("roberta", weights=path)).overrides["max_tokens"] == 512
    with pytest.raises(ValueError, match=r"is a xlm-roberta.*set the tower's encoder to 'roberta'"):
        complete(TowerConfig("bert", weights=path))
    broken = TowerConfig("roberta", weights=folder(tmp_path, model_type="roberta", hidden_act="x"))
    with pytest.raises(ValueError, match=r"config.json: activation 'x' is not supported"):
        complete(broken)


@pytest.mark.parametrize("encoder", [name for name, x in ENCODERS.items() if x.model_types])
def test_a_folder_of_an_unknown_model_is_refused_by_its_name(tmp_path, encoder):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(WeightsMismatch, match=rf"is a t5, .*'{encoder}' reads; no encoder reads"):
        complete(TowerConfig(encoder, weights=str(tmp_path)))


@pytest.mark.parametrize(
    ("encoder", "kind", "reader"),
    [
        ("vit", "dinov2_with_registers", "dinov2"),
        ("vit", "audio-spectrogram-transformer", "ast"),
        ("dinov3", "siglip_vision_model", "siglip"),
        ("bert", "siglip", "siglip_text"),
        ("dinov2", "siglip", "siglip"),
        ("whisper", "wavlm", "wavlm"),
        ("wavlm", "hubert", "wav2vec2"),
    ],
)
def test_the_encoder_that_reads_a_folder_is_named(tmp_path, encoder, kind, reader):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(WeightsMismatch, match=rf"is a {kind}, .*set .* encoder to '{reader}'"):
        complete(TowerConfig(encoder, weights=str(tmp_path)))


@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_a_config_that_holds_no_settings_is_named(tmp_path, content):
    config = TowerConfig("bert", weights=folder(tmp_path))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: holds a \w+, not a JSON object"):
        complete(config)


def test_a_setting_that_is_no_number_is_named(tmp_path):
    config = TowerConfig("bert", weights=folder(tmp_path, hidden_size="24"))
    with pytest.raises(ValueError, match=r"config.json: hidden_size is '24'.*expected a number"):
        complete(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"heads": 4}, "heads=2"), ({"activation": "relu"}, "activation='gelu_erf'")],
)
def test_settings_that_no_shape_shows_are_compared(tmp_path, change, named):
    config = complete(TowerConfig("bert", weights=folder(tmp_path), overrides=change))
    with pytest.raises(WeightsMismatch, match=rf"its config.json has {named}.*overrides"):
        load(config)


VIT = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "qkv_bias": False,
}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def vit_folder(path, **processor):
    (path / "config.json").write_text(json.dumps(VIT))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


def test_a_vit_folder_gives_biases_and_the_range_of_its_pixels(tmp_path):
    overrides = complete(TowerConfig("vit", weights=vit_folder(tmp_path, **IMAGENET))).overrides
    assert overrides["qkv_bias"] is False
    assert overrides["pixel_mean"] == pytest.approx((123.675, 116.28, 103.53))
    assert overrides["pixel_std"] == pytest.approx((58.395, 57.12, 57.375))


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        (IMAGENET | {"rescale_factor": 1 / 127.5}, 0.485 * 127.5, 0.229 * 127.5),
        (IMAGENET | {"do_rescale": False}, 0.485, 0.229),
        (IMAGENET | {"do_normalize": False}, 0.0, 255.0),
        ({"do_resize": True}, None, None),
    ],
)
def test_processors_rescale_and_normalise_or_do_not(tmp_path, processor, mean, std):
    overrides = complete(TowerConfig("vit", weights=vit_folder(tmp_path, **processor))).overrides
    assert ("pixel_mean" in overrides) == (mean is not None)
    if mean is not None:
        assert overrides["pixel_mean"][0] == pytest.approx(mean, abs=1e-6)
        assert overrides["pixel_std"][0] == pytest.approx(std, abs=1e-6)


def test_pixels_of_another_range_than_the_folders_are_asked_for_by_name(tmp_path):
    weights = vit_folder(tmp_path, **IMAGENET)
    own = complete(TowerConfig("vit", weights=weights))
    arrays = {f"towers/text/{path}": leaf for path, leaf in one_tower(own)[1].items()}
    write_safetensors(tmp_path / "model.safetensors", arrays)
    sizes = {k: v for k, v in own.overrides.items() if not k.startswith("pixel_")}
    with pytest.raises(WeightsMismatch, match=r"pixel_mean=\(123.675.*pixel_std"):
        load(TowerConfig("vit", weights=weights, overrides=sizes))
    ours = {"pixel_mean": (127.5,) * 3, "pixel_std": (127.5,) * 3}
    chosen = complete(TowerConfig("vit", weights=weights, overrides=ours))
    assert chosen.overrides["pixel_mean"] == (127.5,) * 3
    load(chosen)


def test_unreadable_pixel_ranges_are_named(tmp_path):
    weights = vit_folder(tmp_path, image_mean=[0.5], image_std=[0.5])
    with pytest.raises(
        ValueError, match=r"preprocessor_config.json: image_mean \[0.5\].*overrides"
    ):
        complete(TowerConfig("vit", weights=weights))


def pooling_folder(path, **content):
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(content))
    return folder(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}, "cls"),
    ],
)
def test_the_pooling_of_sentence_transformers_is_taken(tmp_path, content, expected):
    config = complete(TowerConfig("bert", weights=pooling_folder(tmp_path, **content)))
    settings = encoder_config(config.encoder, config.preset, config.overrides, config.pooling)
    assert settings.pooling == expected
    assert len(load(config).leaves) == 5 + 16
    chosen = complete(TowerConfig("bert", weights=str(tmp_path), pooling="pooler"))
    assert encoder_config("bert", "", chosen.overrides, chosen.pooling).pooling == "pooler"


def test_a_pooling_that_we_do_not_have_is_refused_unless_another_is_chosen(tmp_path):
    both = {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}
    weights = pooling_folder(tmp_path, **both)
    two = r"1_Pooling/config.json: pooling by max_tokens and mean_tokens.*set the"
    with pytest.raises(ValueError, match=two):
        complete(TowerConfig("bert", weights=weights))
    complete(TowerConfig("bert", weights=weights, pooling="mean"))


def own_export(path):
    sizes = {"width": 8, "depth": 2, "heads": 2, "mlp_width": 12, "activation": "relu"}
    towers = {
        "image": TowerConfig("vit", "tiny", {"depth": 1}, pooling="mean"),
        "text": TowerConfig("bert", "tiny", sizes | {"dropout": 0.2}, pooling="mean"),
    }
    _, leaves = two_towers(towers)
    save_folder(path, ModelDescription(towers, embed_dim=8), leaves)
    return leaves


def test_an_own_export_brings_its_sizes(tmp_path):
    leaves = own_export(tmp_path)
    config = complete(TowerConfig("bert", weights=str(tmp_path)))
    settings = encoder_config("bert", "", config.overrides, "")
    assert (settings.width, settings.vocab_size, settings.pooling) == (8, 2048, "mean")
    assert settings.dropout == 0.1  # a run's own choice: the encoder's default
    result = load(config)
    assert not result.initialised
    assert set(result.leaves) == {path for path in leaves if path.startswith("towers/text/")}
    image = complete(TowerConfig("vit", weights=str(tmp_path / "model.safetensors")))
    assert (image.overrides["depth"], image.overrides["pooling"]) == (1, "mean")
    assert complete(TowerConfig("whisper", weights=str(tmp_path))).overrides == {}


def test_a_published_whisper_hears_the_silence_behind_a_recording(tmp_path):
    """As it was trained; `attend_padding=False` is the cheaper way, by name."""
    for preset in ("", "whisper-tiny"):
        config = TowerConfig("whisper", preset, weights=str(tmp_path))
        assert complete(config).overrides["attend_padding"] is True
        cheaper = dataclasses.replace(config, overrides={"attend_padding": False})
        assert complete(cheaper).overrides["attend_padding"] is False
    assert complete(TowerConfig("whisper", "whisper-tiny")).overrides == {}


def test_an_own_exports_unseen_settings_are_compared(tmp_path):
    own_export(tmp_path)
    for change, named in (({"heads": 4}, "heads=2"), ({"activation": "gelu_erf"}, "'relu'")):
        config = complete(TowerConfig("bert", weights=str(tmp_path), overrides=change))
        with pytest.raises(WeightsMismatch, match=rf"its cwcl_jax.json has .*{named}"):
            load(config)
    with pytest.raises(WeightsMismatch, match=r"cwcl_jax.json has .*width=8.*empty preset"):
        load(TowerConfig("bert", "tiny", weights=str(tmp_path)))


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}


def test_a_preset_does_not_pool_otherwise_than_the_folder_says(tmp_path):
    weights = folder(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", MEAN)
    config = complete(TowerConfig("bert", weights=weights, overrides={"pooling": "cls"}))
    load(config)  # on purpose
    overrides = {k: v for k, v in config.overrides.items() if k != "pooling"}
    preset = TowerConfig("bert", "tiny", overrides=overrides, weights=weights)
    with pytest.raises(WeightsMismatch, match=r"pools by 'mean'.*preset 'tiny' by 'cls'"):
        load(preset)


def test_all_settings_that_disagree_are_told_at_once(tmp_path):
    weights = folder(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", MEAN)
    config = complete(TowerConfig("bert", weights=weights, overrides={"pooling": "cls"}))
    overrides = {k: v for k, v in config.overrides.items() if k != "pooling"}
    overrides |= {"heads": 1, "activation": "relu"}
    preset = TowerConfig("bert", "tiny", overrides=overrides, weights=weights)
    told = r"pools by 'mean'.*; fits the tower in shape, but its config.json has heads=2, activ"
    with pytest.raises(WrongSettings, match=told):
        check_settings(tmp_path, preset)


def test_a_sentence_encoder_with_a_layer_that_is_not_read_is_refused(tmp_path):
    weights = folder(tmp_path)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    modules[0]["path"] = ""
    write_json(tmp_path / "modules.json", modules)
    load(complete(TowerConfig("bert", weights=weights)))
    layer = {"path": "2_LSTM", "type": "sentence_transformers.models.LSTM"}
    write_json(tmp_path / "modules.json", [*modules, layer])
    with pytest.raises(ValueError, match=r"2_LSTM \(sentence_transformers.models.LSTM\)"):
        load(complete(TowerConfig("bert", weights=weights)))


def test_positions_of_a_roberta_begin_where_its_padding_says(tmp_path):
    changes = {"model_type": "roberta", "pad_token_id": 3, "max_position_embeddings": 12}
    config = complete(TowerConfig("roberta", weights=folder(tmp_path, **changes)))
    assert (config.overrides["position_offset"], config.overrides["max_tokens"]) == (4, 8)
    usual = complete(
        TowerConfig("roberta", weights=folder(tmp_path, **(changes | {"pad_token_id": 1})))
    )
    assert (usual.overrides["position_offset"], usual.overrides["max_tokens"]) == (2, 10)
