"""Training with LoRA: exact gradients, weights of the unadapted tower, resume, export, WiSE-FT."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.api import load_model
from cwcl_jax.cli import DONE
from cwcl_jax.config import ConfigError
from cwcl_jax.export import main
from cwcl_jax.losses import LossConfig, make_loss
from cwcl_jax.training import sharding
from cwcl_jax.training.checkpoint import Checkpoints
from cwcl_jax.training.encode import Restored, load_encoder, restore
from cwcl_jax.training.interpolation import interpolated
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.run import train
from cwcl_jax.training.state import TrainState, make_blueprint
from cwcl_jax.training.step import GradientFunction, TrainStep
from cwcl_jax.training.summary import tower_table
from cwcl_jax.weights.readers import open_weights
from cwcl_jax.weights.writers import write_safetensors
from tests.training.test_step import assert_same_gradients, host_batches, setup
from tests.training.toy import toy_config

LORA = {
    "towers.image.tune": "lora:2",
    "towers.text.tune": "head+lora:3",
    "towers.text.lora_alpha": 6.0,
}
# Stacked layers, kept or computed again: the leaves carry a layer axis.
DEPTH = 2
SCANNED = {"towers.text.scan_layers": True, "towers.text.remat": "full"}


def moved(state, seed=0):
    """The state with no B at zero, where the gradient of A would be zero too."""
    rng = np.random.default_rng(seed)
    params = {
        path: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) if "/lora_b/" in path
        else leaf
        for path, leaf in state.params.items()
    }  # fmt: skip
    return dataclasses.replace(state, params=params)


def gradients(changes, start=None, **placement):
    """Gradients, the loss, and what they were computed of; `start` is another run's leaves."""
    blueprint, state, locked = setup(changes, **placement)
    params = moved(state).params
    if start is not None:
        params, locked = (
            {p: jax.device_put(stacked(p, start), x.sharding) for p, x in leaves.items()}
            for leaves in (params, locked)
        )
    (batch,) = host_batches(blueprint.config, 1)
    batch = sharding.put_batch(blueprint.mesh, batch)
    found, metrics, _ = jax.jit(GradientFunction(blueprint))(
        params, locked, batch, jnp.zeros((), jnp.int32)
    )
    return jax.device_get(found), float(metrics["loss"]), (blueprint, params, locked, batch)


def stacked(path, leaves):
    """A leaf of a run whose layers are stacked, from those of one whose layers are apart."""
    if path in leaves:
        return np.asarray(leaves[path])
    layers = [path.replace("/blocks/", f"/blocks/{layer}/") for layer in range(DEPTH)]
    return np.stack([leaves[layer] for layer in layers])


def test_gradients_are_those_of_the_sums_and_weights_those_of_the_unadapted_tower():
    found, value, (blueprint, params, locked, batch) = gradients(LORA)
    dense_loss = make_loss(LossConfig(form="dense"))
    plain, scales = blueprint.model_def.plain, {"image": 1.0, "text": 2.0}

    def kernels(params):
        leaves = {**locked, **params}
        for path in [path for path in leaves if "/lora_a/" in path]:
            a, b = leaves.pop(path), leaves.pop(path.replace("lora_a", "lora_b"))
            kernel = path.replace("lora_a/", "")
            change = scales[path.split("/")[1]] * jnp.einsum("ir,ro->io", a, b)
            leaves[kernel] += change.reshape(leaves[kernel].shape)
        return leaves

    def objective(params):
        model = plain.merge(kernels(params))
        base = plain.merge({path: {**locked, **params}[path] for path in plain.paths})
        p = jax.lax.stop_gradient(base.towers["image"](batch["image"]))
        u, v = model.towers["image"](batch["image"]), model.towers["text"](batch["text"])
        return dense_loss(u, v, p, model.logit_scale[...])[0]

    expected, gradient = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_same_gradients(found, gradient)


@pytest.mark.slow
def test_chunks_devices_fsdp_scan_and_remat_give_the_same_gradients():
    """Slow: two deep programs; test_step.py has the same properties for whole kernels."""
    deep = LORA | {"towers.text.overrides.depth": DEPTH}
    # Gradients of keys are differences of nearly equal sums: what is left of them is rounded more.
    kernels = r"encoder/.*(query|value|up)/kernel"
    deep |= {f"towers.{tower}.lora_kernels": kernels for tower in ("image", "text")}
    whole, loss, (_, params, locked, _) = gradients(deep)
    other, other_loss, _ = gradients(
        deep | SCANNED | {"accumulation_steps": 2}, {**params, **locked}, devices=4, fsdp=2
    )
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    assert_same_gradients(other, {path: stacked(path, whole) for path in other})


def test_only_low_rank_leaves_train_and_have_optimizer_state():
    blueprint, state, _ = setup(LORA)
    low_rank = blueprint.low_rank
    assert len(low_rank) == 2 * (7 + 6)
    heads = {"towers/text/head/projection/kernel", "logit_scale"}
    assert state.params.keys() == low_rank | heads
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * len(low_rank | heads) - 2
    (image,) = [line for line in tower_table(blueprint).splitlines() if line.startswith("image")]
    assert f" {6 * 2 * (32 + 32) + 2 * (768 + 32):,} " in image
    assert blueprint.is_only_adapted("image")
    assert not blueprint.features_are_locked("image")


def test_bfloat16_trains_and_only_kernels_that_are_summed_are_kept_wide():
    blueprint, state, locked = setup(LORA | SCANNED | {"dtype": "bfloat16"})
    wide = {p for p, x in locked.items() if p.endswith("/kernel") and x.dtype == jnp.float32}
    assert wide == {"towers/image/encoder/patch_embed/kernel"}
    (batch,) = host_batches(blueprint.config, 1)
    after, metrics = TrainStep(blueprint)(state, locked, batch)
    assert np.isfinite(metrics["loss"])
    assert {str(leaf.dtype) for leaf in after.params.values()} == {"float32"}


@pytest.mark.slow
def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    """Slow: three runs; test_run.py has the same without LoRA."""
    blueprint, state, locked = setup(LORA)
    step = TrainStep(blueprint)
    batches = [sharding.put_batch(blueprint.mesh, x) for x in host_batches(blueprint.config, 3)]
    state, _ = step(state, locked, batches[0])
    with Checkpoints(tmp_path, blueprint.config.checkpoint) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        again, _ = checkpoints.restore(1, blueprint.abstract_state())
    _, _, same_locked = setup(LORA)

    def go_on(state: TrainState, locked):
        for batch in batches[1:]:
            state, _ = step(state, locked, batch)
        return jax.device_get(state.params)

    expected = go_on(state, locked)
    for path, value in go_on(again, same_locked).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps from one file for both towers, which LoRA and a head train."""
    folder = tmp_path_factory.mktemp("lora")
    mesh = sharding.make_mesh(MeshConfig())
    words = {"towers.text.overrides.vocab_size": 301}  # those of the tokenizer for scenes
    start = make_blueprint(toy_config(**words), mesh, check_batch=False)
    rng = np.random.default_rng(0)
    arrays = {
        path: (0.2 * rng.normal(size=leaf.shape) + path.endswith("/scale")).astype(np.float32)
        for path, leaf in start.abstract.items()
    }
    write_safetensors(folder / "model.safetensors", arrays, metadata={})
    changes = {f"towers.{x}.weights": str(folder / "model.safetensors") for x in ("image", "text")}
    changes |= {"optimizer.learning_rate": 0.02, "total_steps": 2, "evaluation.tasks": {}}
    changes |= words | LORA | {"temperature.from_weights": False}
    config = toy_config(**changes)
    assert train(config, folder / "run") == DONE
    return folder


def test_an_export_holds_the_sums_and_nothing_else_changed(finished, tmp_path):
    assert main([f"--source={finished / 'run'}", f"--output={tmp_path}"]) == DONE
    model = load_model(tmp_path)
    encoder, config = load_encoder(finished / "run")
    for tower in config.towers:
        arrays = config.data.inputs_of(tower).arrays()
        rng = np.random.default_rng(1)
        inputs = {
            name: np.ones((5, *spec.shape), bool) if spec.dtype == "bool"
            else rng.integers(0, 200, (5, *spec.shape)).astype(spec.dtype)
            for name, spec in arrays.items()
        }  # fmt: skip
        adapted = encoder.encode(tower, inputs)
        np.testing.assert_allclose(model.encode(tower, inputs), adapted, atol=1e-6)
    old, new = open_weights(finished / "model.safetensors"), open_weights(tmp_path)
    assert new.entries.keys() == old.entries.keys()
    adapters = restore(finished / "run").blueprint.model_def.adapters
    expected = {x.kernel for x in adapters}
    expected |= {"towers/text/head/projection/kernel", "logit_scale"}
    changed = {p for p in old.entries if not np.array_equal(old.read(p), new.read(p))}
    assert changed == expected


def test_interpolation_is_the_average_of_start_and_end(finished, tmp_path):
    start = open_weights(finished / "model.safetensors")
    end = load_model(finished / "run").leaves
    command = [f"--source={finished / 'run'}", f"--output={tmp_path}", "--interpolate=0.25"]
    assert main(command) == DONE
    between = load_model(tmp_path)
    assert between.description.origin["interpolate"] == 0.25
    for path, leaf in between.leaves.items():
        begun = start.read(path).astype(np.float64)
        if path == "logit_scale":  # the config's, since `from_weights` is off
            begun = np.log(toy_config().temperature.initial)
        average = 0.75 * begun + 0.25 * np.asarray(end[path], np.float64)
        np.testing.assert_allclose(leaf, average, atol=1e-7, rtol=1e-7, err_msg=path)


def test_interpolation_without_a_start_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match=r"interpolate=1\.5 must be from 0"):
        load_model(finished / "run", interpolate=1.5)
    main([f"--source={finished / 'run'}", f"--output={tmp_path / 'export'}"])
    with pytest.raises(ValueError, match="is not the workdir of a run"):
        load_model(tmp_path / "export", interpolate=0.5)
    blueprint, state, locked = setup()
    message = r"interpolate=0\.5 .*towers/text/.*random.*towers\.text\.weights='' names no"
    with pytest.raises(ConfigError, match=message):
        interpolated(Restored(blueprint, state.params, locked, 1), 0.5)
