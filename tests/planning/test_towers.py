"""What the planner knows of attention, by the model's own rule."""

from __future__ import annotations

import jax

from cwcl_jax.planning.towers import attention_is_fused, attention_tokens
from cwcl_jax.reproduction.runs import load_experiment
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import make_blueprint
from tests.planning.wide import wide_config


def blueprint_of(config):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return make_blueprint(config, mesh, check_batch=False)


def test_attention_is_fused_in_half_precision_on_chips_that_have_the_kernel():
    half, single = (blueprint_of(wide_config(dtype=name)) for name in ("bfloat16", "float32"))
    for modality in ("image", "text"):
        assert attention_is_fused(half, modality, chip_has_it=True)
        assert not attention_is_fused(half, modality, chip_has_it=False)
        assert not attention_is_fused(single, modality, chip_has_it=True)


def test_tokens_are_those_of_the_inputs():
    blueprint = blueprint_of(wide_config(**{"data.text.max_tokens": 15}))
    assert attention_tokens(blueprint, "text") == 15
    assert attention_tokens(blueprint, "image") == 17


def test_features_from_a_file_have_no_attention():
    blueprint = blueprint_of(load_experiment("configs/features_cwcl.py"))
    assert attention_tokens(blueprint, "v") == 0
    assert attention_is_fused(blueprint, "v", chip_has_it=False)
