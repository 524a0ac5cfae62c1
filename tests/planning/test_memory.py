"""Reckoned memory against a step that really ran, and against the literature."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.plan import on_chip
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.compiled import compile_step
from cwcl_jax.planning.estimate import Planner
from cwcl_jax.planning.kept import kept_for_backward
from cwcl_jax.planning.memory import state_bytes
from cwcl_jax.planning.report import report
from cwcl_jax.planning.towers import tower_needs
from cwcl_jax.reproduction.runs import load_experiment
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import initialise
from cwcl_jax.training.step import TrainStep
from tests.planning.wide import TEXT, wide_config


def on_first_device(tree):
    """Bytes that real arrays occupy there."""
    first = jax.devices()[0]
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


@pytest.mark.parametrize("fsdp", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_memory_agrees_with_a_step_that_ran(fsdp):
    config = dataclasses.replace(wide_config(), mesh=MeshConfig(fsdp=fsdp))
    base = Planner(CHIPS["a100-40"], jax.devices()).estimate(config)
    compiled = compile_step(base.blueprint, base.batch)

    state, locked, _ = initialise(base.blueprint)
    batch = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), base.batch)
    batch = sharding.put_batch(base.blueprint.mesh, batch)
    step = TrainStep(base.blueprint)
    run = step._jitted.lower(state, locked, batch).compile()
    state, _ = run(state, locked, batch)
    memory = run.memory_analysis()

    there = on_first_device((state, locked, batch))
    reckoned = base.memory.state + state_bytes(jax.tree.leaves(base.batch))
    assert reckoned == pytest.approx(there, rel=0.1)
    assert compiled.argument_bytes == pytest.approx(memory.argument_size_in_bytes, rel=0.1)
    assert compiled.temporary_bytes == pytest.approx(memory.temp_size_in_bytes, rel=0.1)


def test_fsdp_splits_the_state():
    chip, devices = CHIPS["h100"], jax.devices()
    whole, split = (
        Planner(chip, devices).estimate(
            dataclasses.replace(wide_config(), mesh=MeshConfig(fsdp=fsdp))
        )
        for fsdp in (1, 4)
    )
    # Small leaves (biases, norms) stay whole on every device.
    assert split.memory.optimizer == pytest.approx(whole.memory.optimizer / 4, rel=0.1)
    assert split.memory.activations == whole.memory.activations
    assert sum(split.sent.values()) > sum(whole.sent.values())


def test_a_block_keeps_sixteen_arrays_of_its_tokens():
    """Korthikanti et al. 2022, section 4.1: 34 bytes per element in 16 bits with dropout masks."""
    config = wide_config(**{"towers.text.overrides": TEXT | {"depth": 9}})
    needs = tower_needs(config, "text", ())
    per_block = 16 * TEXT["max_tokens"] * TEXT["width"] * 4
    assert needs.kept == pytest.approx(9 * per_block, rel=0.1)


def test_needs_grow_by_the_block_as_a_whole_trace_says():
    deep = wide_config(**{"towers.text.overrides": TEXT | {"depth": 4}})
    from_blocks = tower_needs(deep, "text", ())
    towers = {**deep.towers, "text": dataclasses.replace(deep.towers["text"], tune="last:4")}
    whole = tower_needs(dataclasses.replace(deep, towers=towers), "text", ())
    # With last:4 the embeddings are locked, and their gather keeps nothing.
    assert from_blocks.kept == pytest.approx(whole.kept, rel=0.05)


def test_elementwise_chains_are_computed_again_and_products_kept():
    def function(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel) * 2 + 1
        return x

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    kernels = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * 3
    kept = kept_for_backward(function, kernels, x)
    # Three results before tanh, and the operands of the second and third product.
    assert kept.other == 5 * 8 * 16 * 4


def test_remat_keeps_block_inputs_only():
    plain = tower_needs(wide_config(), "text", ())
    again = tower_needs(wide_config(**{"towers.text.remat": "full"}), "text", ())
    assert again.kept < 0.25 * plain.kept
    assert again.working > plain.working


def test_locked_towers_keep_nothing():
    config = wide_config(**{"towers.image.tune": "none", "towers.image.head": "none",
                            "embed_dim": 128})  # fmt: skip
    needs = tower_needs(config, "image", ())
    assert needs.kept == needs.kept_scores == 0
    assert needs.working > 0


def test_the_largest_batch_fits_and_the_next_does_not():
    chip = dataclasses.replace(CHIPS["a100-40"], memory=200_000_000)
    base = Planner(chip, jax.devices()).estimate(wide_config())
    largest, step = base.largest_batch(), base.devices
    limit = 0.9 * chip.memory
    assert largest % step == 0
    assert base.memory_of(largest).total <= limit < base.memory_of(largest + step).total


@pytest.mark.parametrize("devices", [1, 4])
def test_a_dense_loss_holds_arrays_of_all_pairs(devices):
    """XLA for CPUs keeps 8 to 11 of them; for GPUs, see test_targets."""
    changes = {"loss.form": "dense", "global_batch_size": 4096}
    base = Planner(CHIPS["a100-80"], jax.devices()[:devices]).estimate(
        from_features(**changes), embedded=()
    )
    pairs = 4 * 4096**2 / devices
    assert base.memory.loss == pytest.approx(4 * pairs, rel=0.2)
    found = compile_step(base.blueprint, base.batch)
    assert base.memory.loss < found.temporary_bytes < 3 * base.memory.loss
    fused = Planner(CHIPS["a100-80"], jax.devices()[:devices]).estimate(
        from_features(global_batch_size=4096)
    )
    assert base.largest_batch() < 0.1 * fused.largest_batch()
    assert "(dense)" in report(base, None, (), efficiency=0.5)


def of_wide_weights(size, width, **loss):
    """Embeds of `width` on 4 devices, weights from features of 2048."""
    config = load_experiment("configs/features_cwcl.py", "projection=trained")
    u = dataclasses.replace(config.towers["u"], overrides={"width": 2048})
    config = dataclasses.replace(
        config,
        towers={**config.towers, "u": u},
        embed_dim=width,
        global_batch_size=size,
        loss=dataclasses.replace(config.loss, **loss),
    )
    return Planner(CHIPS["h100"], jax.devices()).estimate(on_chip(config, CHIPS["h100"]))


@pytest.mark.parametrize("name", ["cwcl", "contrastive"])
@pytest.mark.parametrize("size", [2**15, 2**17])
def test_memory_is_that_of_the_form_that_the_step_takes(size, name):
    """The step's choice goes by u and p, whose widths differ, whatever the loss makes of p."""
    base = of_wide_weights(size, 1024, name=name)
    ring = "ppermute" in base.work.sent
    assert ring == (size * (1024 + 2048) * 4 > 2**30)
    form = "ring" if ring else "gathered"
    assert base.memory.loss == of_wide_weights(size, 1024, name=name, form=form).memory.loss


def test_weights_that_are_made_of_pairs_need_the_features_of_all():
    closed, pairs = (
        of_wide_weights(2**13, 64, form="gathered", weight_function=function)
        for function in ("affine", "relu")
    )
    features = 4 * 2**13 * 2048
    assert pairs.memory.loss - closed.memory.loss == features
    # As the traced program gathers them, of three other devices.
    sent = pairs.work.sent["all_gather"] - closed.work.sent["all_gather"]
    assert sent == pytest.approx(features * 3 / 4, rel=0.01)


def test_another_batch_is_reckoned_as_if_it_were_the_configs():
    small, large = (of_wide_weights(size, 64, form="gathered") for size in (2**9, 2**18))
    assert small.memory_of(2**18) == large.memory
    assert small.largest_batch() == large.largest_batch()


def from_features(**changes):
    config = load_experiment("configs/features_cwcl.py")
    loss = dataclasses.replace(
        config.loss, form=changes.pop("loss.form", "auto"), block_columns=4096
    )
    return dataclasses.replace(config, loss=loss, **changes)
