"""What a run takes from the weights' files, and what it refuses to leave random."""

import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.training import sharding
from cwcl_jax.training.state import import_towers, make_blueprint
from cwcl_jax.weights.writers import write_safetensors
from tests.training.toy import toy_config


def blueprint_of(config):
    return make_blueprint(config, sharding.make_mesh(config.mesh), check_batch=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both towers and the logit scale of a model, as one file; heads are missing."""
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    blueprint = blueprint_of(toy_config())
    arrays = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in blueprint.abstract.items()
        if "/head/" not in path
    }
    write_safetensors(file, arrays | {"logit_scale": np.float32(np.log(77))}, metadata={})
    return str(file)


def test_a_locked_tower_is_not_left_with_a_random_projection(exported):
    changes = {"towers.image.weights": exported, "towers.image.head": "linear"}
    with pytest.raises(ConfigError, match=r"head/projection/kernel.*random.*head='none'"):
        import_towers(blueprint_of(toy_config(**changes)))
    for more in ({"towers.image.head": "none"}, {"towers.image.tune": "head"}):
        import_towers(blueprint_of(toy_config(**(changes | more))))


def test_locked_kernels_are_small_in_a_run_and_whole_where_a_model_is_taken_out(exported):
    config = toy_config(**{"dtype": "bfloat16", "towers.image.weights": exported})
    for compact, dtype in ((True, "bfloat16"), (False, "float32")):
        mesh = sharding.make_mesh(config.mesh)
        blueprint = make_blueprint(config, mesh, check_batch=False, compact=compact)
        kernels = {leaf.dtype for p, leaf in blueprint.abstract_locked.items() if "kernel" in p}
        assert {str(kind) for kind in kernels} == {dtype}


def test_the_logit_scale_of_one_file_for_both_towers_is_taken(exported):
    both = {"towers.image.weights": exported, "towers.text.weights": exported}

    def scale(**changes):
        leaves, _ = import_towers(blueprint_of(toy_config(**changes)))
        return leaves.get("logit_scale")

    assert float(scale(**both)) == pytest.approx(np.log(77))
    assert scale(**both, **{"temperature.from_weights": False}) is None
    assert scale(**{"towers.image.weights": exported}) is None
