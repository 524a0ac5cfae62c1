"""Counted work against XLA's figures and against formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from cwcl_jax.planning.compiled import compile_step
from cwcl_jax.planning.hlo import product_flops
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.planning.work import count_work
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import make_blueprint
from cwcl_jax.training.step import GradientFunction
from tests.planning.wide import wide_config


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs():
    def looped(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]

    work = count_work(looped, f32(4, 8), f32(8, 8), devices=1)
    assert work.total_flops == 7 * 2 * 4 * 8 * 8
    compiled = jax.jit(looped).lower(f32(4, 8), f32(8, 8)).compile()
    assert product_flops(compiled.as_text()) == work.total_flops


def test_precision_decides_the_class_of_a_product():
    def mixed(a, b):
        half = a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)
        return half, a @ b, *(jnp.matmul(a, b, precision=name) for name in ("high", "highest"))

    work = count_work(mixed, f32(2, 3), f32(3, 4), devices=1)
    assert dict(work.flops) == {"half": 48, "single": 48, "high": 48, "highest": 48}


def test_convolutions_count_their_kernel():
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")

    work = count_work(conv, f32(1, 3, 10, 10), f32(5, 3, 3, 3), devices=1)
    assert work.total_flops == 2 * 5 * 8 * 8 * 3 * 9


@pytest.mark.parametrize(
    ("changes", "devices", "fsdp"),
    [
        ({}, 1, 1),
        ({"accumulation_steps": 2, "towers.text.scan_layers": True}, 4, 2),
        ({"loss.form": "ring", "loss.weight_function": "exp"}, 4, 1),
    ],
    ids=["one device", "chunks, scanned, fsdp", "ring of weights"],
)
def test_flops_agree_with_the_compiled_step(changes, devices, fsdp):
    config = wide_config(**changes)
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    blueprint = make_blueprint(config, mesh)
    batch = abstract_batch(blueprint)
    work = count_work(
        GradientFunction(blueprint),
        blueprint.abstract_params,
        blueprint.abstract_locked,
        batch,
        jax.ShapeDtypeStruct((), jnp.int32),
        devices=devices,
    )
    compiled = compile_step(blueprint, batch)
    # Exact but for products that the compiler drops or joins.
    assert work.total_flops == pytest.approx(compiled.product_flops, rel=0.1)
    if not changes:  # no loops: XLA's own count holds, elementwise work included
        assert work.total_flops == pytest.approx(compiled.cost_flops, rel=0.1)
    if "accumulation_steps" in changes:  # the towers run inside of loops, which XLA counts once
        assert compiled.cost_flops < 0.8 * compiled.product_flops
