"""What the planner knows of attention, by the model's own rule."""

from __future__ import annotations

import jax
import pytest

from cwcl_jax.planning.towers import attention_is_fused, sequence
from cwcl_jax.reproduction.runs import load_experiment
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import make_blueprint
from tests.planning.wide import wide_config


def blueprint_of(config):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return make_blueprint(config, mesh, check_batch=False)


@pytest.mark.parametrize(("tokens", "fused"), [(16, True), (15, False)])
def test_masked_attention_is_fused_for_even_lengths_only(tokens, fused):
    blueprint = blueprint_of(wide_config(**{"data.text.max_tokens": tokens, "dtype": "bfloat16"}))
    assert sequence(blueprint, "text") == (tokens, True)
    assert attention_is_fused(blueprint, "text", chip_has_it=True) is fused
    assert not attention_is_fused(blueprint, "text", chip_has_it=False)


def test_pictures_have_no_mask_and_float32_is_not_fused():
    half, single = (blueprint_of(wide_config(dtype=name)) for name in ("bfloat16", "float32"))
    assert sequence(half, "image") == (17, False)
    assert attention_is_fused(half, "image", chip_has_it=True)
    assert not attention_is_fused(single, "image", chip_has_it=True)


def test_features_from_a_file_have_no_attention():
    blueprint = blueprint_of(load_experiment("configs/features_cwcl.py"))
    assert sequence(blueprint, "v") == (0, False)
    assert attention_is_fused(blueprint, "v", chip_has_it=False)
