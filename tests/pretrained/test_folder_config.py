"""Sizes from a folder's config.json: taken without a preset, explained beside a wrong one."""

import json

import pytest

from cwcl_jax.models.encoders import encoder_config
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.pretrained import WeightsMismatch, complete, import_tower
from cwcl_jax.pretrained.writers import write_safetensors
from tests.models.builders import one_tower
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
    assert complete(TowerConfig("bert", weights=path)).overrides == {}
    broken = TowerConfig("roberta", weights=folder(tmp_path, model_type="roberta", hidden_act="x"))
    with pytest.raises(ValueError, match=r"config.json: activation 'x' is not supported"):
        complete(broken)
