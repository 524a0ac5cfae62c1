"""The train step: exact gradients, locked leaves untouched, one trace, any mesh, any chunking."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.data.pipeline import train_batches
from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import initialise, make_blueprint
from cwcl_jax.training.step import GradientFunction, TrainStep, join_chunks, split_chunks
from tests.training.toy import toy_config


def setup(changes=None, *, devices=1, fsdp=1):
    config = toy_config(**(changes or {}))
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    blueprint = make_blueprint(config, mesh)
    state, locked, _ = initialise(blueprint)
    return blueprint, state, locked


def host_batches(config, count):
    batches = train_batches(
        config.data,
        config.tower_names,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        process_index=0,
        process_count=1,
    )
    result = [dict(next(batches)) for _ in range(count)]
    batches.close()
    for batch in result:
        batch.pop("index")
    return result


def run(changes=None, *, steps=3, **placement):
    """Losses by step, final params and locked leaves, on the host; made once, read by several."""
    return _run(json.dumps(changes or {}), steps, json.dumps(placement))


@functools.cache
def _run(changes, steps, placement):
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(changes).items()}
    blueprint, state, locked = setup(changes, **json.loads(placement))
    step = TrainStep(blueprint)
    losses = []
    for batch in host_batches(blueprint.config, steps):
        state, metrics = step(state, locked, sharding.put_batch(blueprint.mesh, batch))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params), jax.device_get(locked), step


def test_step_is_traced_once():
    *_, step = run()
    assert step.traces == 1


def test_locked_leaves_are_bit_identical_after_training_with_weight_decay():
    blueprint, _, before = setup()
    assert blueprint.config.optimizer.weight_decay == 0.1
    before = jax.device_get(before)
    _, _, after, _ = run()
    assert before.keys() == after.keys()
    assert any(path.startswith("towers/image/encoder/") for path in before)
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


def test_every_trained_leaf_moves():
    _, state, _ = setup()
    before = jax.device_get(state.params)
    _, after, _, _ = run()
    unmoved = [path for path in before if np.array_equal(before[path], after[path])]
    # A softmax over keys is unchanged by a bias that is added to all of them.
    assert [path for path in unmoved if not path.endswith("key/bias")] == []


@pytest.mark.parametrize(
    ("changes", "fsdp"),
    [
        ({}, 4),
        # Slow: parts of what the others are.
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param({"loss.name": "contrastive"}, 2, marks=pytest.mark.slow),
        pytest.param({"loss.name": "supervised", "data.labels": "text"}, 2, marks=pytest.mark.slow),
        ({"optimizer.name": "muon"}, 4),
    ],
)
def test_four_devices_give_the_losses_of_one(changes, fsdp):
    one, *_ = run(changes)
    four, *_ = run(changes, devices=4, fsdp=fsdp)
    np.testing.assert_allclose(four, one, rtol=1e-5)


@pytest.mark.parametrize(
    ("towers", "devices"),
    [
        ({}, 2),
        ({"towers.image.tune": "head", "towers.image.head": "linear"}, 2),
        # Slow: test_weights_that_are_not_detached_train_their_tower compares chunks of two trained
        # towers with the equations.
        pytest.param({"towers.image.tune": "all"}, 1, marks=pytest.mark.slow),
    ],
    ids=["locked", "head", "both"],
)
def test_chunks_give_the_gradients_of_the_whole_batch(towers, devices):
    def gradients(chunks):
        blueprint, state, locked = setup({"accumulation_steps": chunks, **towers}, devices=devices)
        (batch,) = host_batches(blueprint.config, 1)
        batch = sharding.put_batch(blueprint.mesh, batch)
        found, metrics, _ = jax.jit(GradientFunction(blueprint))(
            state.params, locked, batch, jnp.zeros((), jnp.int32)
        )
        return jax.device_get(found), float(metrics["loss"])

    (whole, loss), (chunked, chunked_loss) = gradients(1), gradients(4)
    np.testing.assert_allclose(chunked_loss, loss, rtol=1e-5)
    assert_same_gradients(chunked, whole)


def test_gradients_are_those_of_the_equations():
    blueprint, state, locked = setup()
    (batch,) = host_batches(blueprint.config, 1)
    batch = sharding.put_batch(blueprint.mesh, batch)
    found, metrics, _ = jax.jit(GradientFunction(blueprint))(
        state.params, locked, batch, jnp.zeros((), jnp.int32)
    )

    dense_loss = make_loss(LossConfig(form="dense"))

    def objective(params):
        model = blueprint.model_def.merge({**params, **locked})
        u = model.towers["image"](batch["image"])
        v = model.towers["text"](batch["text"])
        return dense_loss(u, v, u, model.logit_scale[...])[0]

    loss, expected = jax.jit(jax.value_and_grad(objective))(state.params)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_same_gradients(found, expected)


def assert_same_gradients(found, expected):
    """Equal to 1e-5 of each leaf's largest entry."""
    assert found.keys() == expected.keys()
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for path, value in expected.items():
        # The bias of the keys has no gradient: it adds the same to all logits of a softmax. What
        # is left is the rounding of the sum that cancels, measured against the other leaves.
        scale = largest if path.endswith("key/bias") else float(np.abs(value).max())
        np.testing.assert_allclose(found[path] / scale, value / scale, atol=1e-5, err_msg=path)


def test_chunking_keeps_each_example_on_its_device_and_is_undone():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2))
    x = jax.device_put(jnp.arange(32.0).reshape(16, 2), sharding.batch_sharding(mesh))
    chunks = jax.jit(lambda x: split_chunks(mesh, x, 2))(x)
    assert chunks.shape == (2, 8, 2)
    homes = {s.device: set(np.asarray(s.data)[:, 0].tolist()) for s in x.addressable_shards}
    for shard in chunks.addressable_shards:
        assert set(np.asarray(shard.data)[..., 0].ravel().tolist()) == homes[shard.device]
    np.testing.assert_array_equal(jax.jit(lambda c: join_chunks(mesh, c))(chunks), x)


def test_logit_scale_is_clamped():
    changes = {
        "temperature.initial": 99.0,
        "temperature.maximum": 99.5,
        "optimizer.multipliers": ("logit_scale=1000",),
    }
    _, params, _, _ = run(changes, steps=4)
    assert float(np.exp(params["logit_scale"])) <= 99.5 * (1 + 1e-6)


def test_fixed_temperature_is_locked():
    _, state, locked = setup({"temperature.trained": False})
    assert "logit_scale" not in state.params
    np.testing.assert_allclose(np.exp(locked["logit_scale"]), 1 / 0.07, rtol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_stores_locked_kernels_small():
    _, state, locked = setup({"dtype": "bfloat16"})
    assert {leaf.dtype for leaf in state.params.values()} == {np.dtype("float32")}
    kernels = [leaf for path, leaf in locked.items() if path.endswith("/kernel")]
    assert kernels
    assert {leaf.dtype for leaf in kernels} == {jnp.dtype("bfloat16")}
    losses, *_ = run({"dtype": "bfloat16"})
    exact, *_ = run()
    # bfloat16 keeps eight bits: 1 % of a loss of about 5.
    np.testing.assert_allclose(losses, exact, rtol=1e-2)


def test_optimizer_state_covers_trained_leaves_only():
    _, state, _ = setup()
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    trained = [leaf for leaf in state.params.values() if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained)


def test_initial_values_do_not_depend_on_the_mesh():
    _, one, _ = setup()
    _, four, _ = setup(devices=4, fsdp=4)
    for path, value in one.params.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(four.params[path]))


def test_sigmoid_loss_trains_a_bias():
    losses, params, _, _ = run({"loss.name": "sigmoid"})
    assert "logit_bias" in params
    assert float(params["logit_bias"]) != -10.0
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    "chunks",
    # Slow: without chunks it goes the way of test_gradients_are_those_of_the_equations.
    [pytest.param(1, marks=pytest.mark.slow), 4],
)
@pytest.mark.parametrize(
    "loss",
    [
        {"loss.detach_weights": False},
        pytest.param({"loss.name": "cellclip"}, marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_not_detached_train_their_tower(loss, chunks):
    """Against the dense loss of the whole batch, differentiated through p."""
    changes = {"towers.image.tune": "all", "accumulation_steps": chunks, **loss}
    blueprint, state, locked = setup(changes, devices=2)
    (batch,) = host_batches(blueprint.config, 1)
    batch = sharding.put_batch(blueprint.mesh, batch)
    found, metrics, _ = jax.jit(GradientFunction(blueprint))(
        state.params, locked, batch, jnp.zeros((), jnp.int32)
    )
    dense_loss = make_loss(dataclasses.replace(blueprint.config.loss, form="dense"))

    def objective(params, detached):
        model = blueprint.model_def.merge({**params, **locked})
        features = model.towers["image"].features(batch["image"])
        p = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        p = jax.lax.stop_gradient(p) if detached else p
        u, v = model.towers["image"].project(features), model.towers["text"](batch["text"])
        return dense_loss(u, v, p, model.logit_scale[...])[0]

    gradient = jax.jit(jax.value_and_grad(objective), static_argnums=1)
    (value, expected), (_, without) = (gradient(state.params, d) for d in (False, True))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_same_gradients(found, expected)
    image = [path for path in expected if path.startswith("towers/image/encoder/")]
    change = max(np.abs(expected[path] - without[path]).max() for path in image)
    assert change > 1e-3 * max(np.abs(expected[path]).max() for path in image)


def own_loss(u, v, q, logit_scale, labels, progress):
    """A loss of a person's own, of everything that the step hands over."""
    log_p = jax.nn.log_softmax(jnp.exp(logit_scale) * u @ v.T, axis=1)
    same = (labels[:, None] == labels[None, :]).astype(log_p.dtype)
    targets = same + progress * jnp.maximum(q @ q.T, 0)
    return -(targets / targets.sum(axis=1, keepdims=True) * log_p).sum(axis=1).mean(), {}


@pytest.mark.parametrize(
    "loss",
    [
        # Slow: test_soft_targets.py compares such losses in chunks on a ring with the equations.
        pytest.param(
            {"loss.name": "softclip", "loss.mix": (1.0, 0.3), "towers.image.tune": "all"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss.name": "s2l", "loss.weight_function": "distance30_0.1"}, marks=pytest.mark.slow
        ),
        {"loss.name": "tests.training.test_step:own_loss", "data.labels": "text"},
    ],
    ids=["softclip", "s2l", "own"],
)
def test_losses_of_the_frame_train_alike_in_chunks_on_four_devices(loss):
    ring = {} if ":" in loss["loss.name"] else {"loss.form": "ring"}
    one, params, _, _ = run(loss)
    four, others, _, _ = run({"accumulation_steps": 2, **ring, **loss}, devices=4, fsdp=2)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    assert one[-1] != one[0]
    assert params.keys() == others.keys()
    assert ("logit_bias" in params) == (loss["loss.name"] == "s2l")


def test_distances_go_by_features_that_are_not_normalised():
    changes = {"loss.name": "s2l", "loss.weight_function": "distance3_0.1"}
    blueprint, state, locked = setup(changes)
    (batch,) = host_batches(blueprint.config, 1)
    batch = sharding.put_batch(blueprint.mesh, batch)
    _, metrics, _ = jax.jit(GradientFunction(blueprint))(
        state.params, locked, batch, jnp.zeros((), jnp.int32)
    )
    model = blueprint.model_def.merge({**state.params, **locked})
    features = np.asarray(model.towers["image"].features(batch["image"]), np.float64)
    squared = ((features[:, None] - features[None]) ** 2).sum(axis=-1)
    weights = 1 - np.arctan(squared / 3) * 4 / np.pi
    weights = np.where(weights < 0.1, 0, weights)
    own = np.diagonal(weights) / weights.sum(axis=1)
    assert float(metrics["diagonal_weight"]) == pytest.approx(own.mean(), rel=1e-4)
    assert 1 / len(own) < own.mean() < 1
