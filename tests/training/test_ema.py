"""The averages of the leaves: against one made by hand, and begun in the middle of a run."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.training import ema, sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.encode import restore
from cwcl_jax.training.options import CheckpointConfig, MeshConfig, OptimizerConfig
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.training.step import TrainStep
from tests.training.test_step import host_batches
from tests.training.toy import toy_config


def by_hand(leaves, decays, start):
    """The average in float64 of the leaves after each update."""
    average = np.asarray(start, np.float64)
    for leaf, decay in zip(leaves, decays, strict=True):
        average = decay * average + (1 - decay) * np.asarray(leaf, np.float64)
    return average


def warm(decay, count):
    """timm's warm-up with gamma 1 and power 2/3."""
    return [min(decay, 1 - (1 + t) ** (-2 / 3)) for t in range(count)]


@pytest.mark.parametrize("warm_start", [True, False])
def test_the_decay_is_that_of_timm(warm_start):
    config = OptimizerConfig(ema_decay=0.999, ema_warm_start=warm_start)
    steps = [0, 1, 2, 10, 1_000, 30_000, 40_000]
    expected = [min(0.999, 1 - (1 + t) ** (-2 / 3)) if warm_start else 0.999 for t in steps]
    found = [float(ema.decay_at(config, np.int32(step))) for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_averages_of_a_run_are_those_made_by_hand_on_a_mesh():
    """A compiled step: that the average is the step's own, and lies as the leaves do."""
    config = toy_config(**{"optimizer.ema_decay": 0.7, "mesh.fsdp": 2})
    blueprint = make_blueprint(config, sharding.make_mesh(MeshConfig(fsdp=2)))
    state, locked, _ = initialise(blueprint)
    start = jax.device_get(state.params)
    step, seen = TrainStep(blueprint), []
    for batch in host_batches(config, 5):
        state, _ = step(state, locked, sharding.put_batch(blueprint.mesh, batch))
        seen.append(jax.device_get(state.params))
    decays = warm(0.7, 5)
    assert decays[-1] > 0.65
    for path, average in state.ema.items():
        expected = by_hand([leaves[path] for leaves in seen], decays, start[path])
        np.testing.assert_allclose(np.asarray(average), expected, rtol=1e-7, atol=1e-7)
        assert average.sharding == state.params[path].sharding
    assert state.ema.keys() == state.params.keys()


def test_averages_are_saved_and_an_old_run_has_none(tmp_path):
    config = toy_config(**{"optimizer.ema_decay": 0.5})
    blueprint = make_blueprint(config, sharding.make_mesh(MeshConfig()))
    state = initialise(blueprint)[0]
    state = dataclasses.replace(state, ema={k: 2 * v for k, v in state.params.items()})
    target = blueprint.abstract_state()
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, dataclasses.replace(state, ema={}), {"position": 1})
        checkpoints.save(2, state, {"position": 2})
        checkpoints.wait()
        assert checkpoints.restore(1, target)[0].ema == {}
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, target)[0], state)
        averages = checkpoints.restore_model(2, target, "ema")
        jax.tree.map(np.testing.assert_array_equal, averages, state.ema)
        with pytest.raises(ConfigError, match=r"/1 holds no averages .*ema_decay"):
            checkpoints.restore_model(1, target, "ema")
        # A run without averages has the checkpoints that it always had.
        assert not (tmp_path / "1" / "ema").exists()
        assert (tmp_path / "2" / "ema").is_dir()


def test_other_names_of_weights_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="weights='mean' is not one of trained, ema"):
        restore(tmp_path, weights="mean")
