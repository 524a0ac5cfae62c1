"""Counted work against the compiled program and against formulas."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from cwcl_jax.models.attention import attend
from cwcl_jax.planning.chips import CHIPS
from cwcl_jax.planning.estimate import step_work
from cwcl_jax.planning.inputs import abstract_batch
from cwcl_jax.planning.targets import as_on
from cwcl_jax.planning.work import count_work
from cwcl_jax.training import sharding
from cwcl_jax.training.options import MeshConfig
from cwcl_jax.training.state import make_blueprint
from cwcl_jax.training.step import TrainStep
from tests.planning.wide import wide_config


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def compiled_flops(hlo: str) -> float:
    """Of the `dot`s of one run of a compiled program, bodies of loops as often as they run."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.M | re.S))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.M)[1]

    def shape_of(body, name):
        found = re.search(rf"%?{re.escape(name)} = \(?\w+\[([\d,]*)\]", body)
        return [int(size) for size in found[1].split(",") if size]

    def total(name):
        flops = 0.0
        for line in bodies[name].splitlines():
            if dot := re.search(r"%?([\w.\-]+) = \S+ dot\(%?([\w.\-]+)", line):
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1].split(",")
                left = shape_of(bodies[name], dot[2])
                depth = math.prod(left[int(axis)] for axis in axes if axis)
                flops += 2 * math.prod(shape_of(bodies[name], dot[1])) * depth
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
            for called in re.findall(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                flops += (int(times[1]) if times else 1) * total(called)
        return flops

    return total(entry)


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs():
    def looped(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, length=7)[0]

    work = count_work(looped, f32(4, 8), f32(8, 8), devices=1)
    assert work.total_flops == 7 * 2 * 4 * 8 * 8
    compiled = jax.jit(looped).lower(f32(4, 8), f32(8, 8)).compile()
    assert compiled_flops(compiled.as_text()) == work.total_flops


def test_precision_decides_the_class_of_a_product():
    def mixed(a, b):
        half = a.astype(jnp.bfloat16) @ b.astype(jnp.bfloat16)
        return half, a @ b, *(jnp.matmul(a, b, precision=name) for name in ("high", "highest"))

    work = count_work(mixed, f32(2, 3), f32(3, 4), devices=1)
    assert work.flops == {"half": 48, "single": 48, "high": 48, "highest": 48}
    assert work.touched == (2 + 3 * 4) * (2 * 3 + 3 * 4 + 2 * 4)


def test_convolutions_count_their_kernel():
    def conv(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "VALID")

    work = count_work(conv, f32(1, 3, 10, 10), f32(5, 3, 3, 3), devices=1)
    assert work.total_flops == 2 * 5 * 8 * 8 * 3 * 9


@pytest.mark.parametrize("tokens", [64, 197])
def test_cudnns_attention_counts_its_products_and_keeps_no_scores(tokens):
    """The kernel of two GEMMs forward and five backward; XLA's attention has six and the scores.

    In training it takes even lengths only: 197 tokens, of a ViT, are 198 there.
    """
    batch, heads, width = 2, 3, 16
    array = jax.ShapeDtypeStruct((batch, tokens, heads, width), jnp.bfloat16)
    one = 2 * batch * heads * width

    def work_of(implementation):
        def loss(q, k, v):
            out = attend(q, k, v, None, causal=False, implementation=implementation)
            return jnp.sum(out.astype(jnp.float32))

        # With the value: without it nothing reads the forward pass's second product.
        step = jax.value_and_grad(loss, (0, 1, 2))
        return count_work(step, array, array, array, devices=1)

    with as_on(CHIPS["h100"]):
        fused, plain = work_of("auto"), work_of("xla")
    assert (fused.fused_attentions, plain.fused_attentions) == (1, 0)
    assert fused.flops == {"half": 7 * one * (tokens + tokens % 2) ** 2}
    assert plain.total_flops == 6 * one * tokens**2
    assert fused.touched < plain.touched


@pytest.mark.parametrize(
    ("changes", "devices", "fsdp"),
    [
        ({}, 1, 1),
        ({"accumulation_steps": 2, "towers.text.scan_layers": True}, 4, 2),
        ({"loss.form": "ring", "loss.weight_function": "exp"}, 4, 1),
        # Slow: 12 s for the products of an optimizer that few choose.
        pytest.param({"optimizer.name": "muon"}, 4, 1, marks=pytest.mark.slow),
    ],
    ids=["one device", "chunks, scanned, fsdp", "ring of weights", "muon"],
)
def test_flops_agree_with_the_compiled_step(changes, devices, fsdp):
    config = wide_config(**changes)
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    blueprint = make_blueprint(config, mesh)
    batch = abstract_batch(blueprint)
    work = step_work(blueprint, batch)
    compiled = TrainStep(blueprint).lower(batch).compile()
    # Exact but for products that the compiler drops or joins.
    assert work.total_flops == pytest.approx(compiled_flops(compiled.as_text()), rel=0.1)
    # XLA's own count includes elementwise work, and counts the body of a loop once.
    theirs = compiled.cost_analysis()["flops"]
    if not changes:
        assert work.total_flops == pytest.approx(theirs, rel=0.1)
    if "accumulation_steps" in changes:
        assert theirs < 0.8 * work.total_flops
