"""Four virtual devices (tests/conftest.py)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cwcl_jax.losses import LossConfig, cwcl_loss, make_loss
from cwcl_jax.losses.options import resolve
from cwcl_jax.losses.presets import PRESETS
from tests.losses.test_fused import (
    BOTH,
    CASES,
    assert_close_to_oracle,
    data_of,
    value_and_gradients,
)

SHARDED = [
    ("mixed relu, both", "ring"),
    ("calibrated, duplicates masked", "gathered"),
    ("calibrated of each modality", "ring"),
    ("gist, relative, weighted", "gathered"),
    ("gist, relative, weighted", "ring"),
    ("softclip", "ring"),
    ("morphoclip", "ring"),
    ("s2l, mixed, masked, replicates", "ring"),
]


def mesh_of(*shape, names=("data", "fsdp")):
    return jax.make_mesh(
        shape,
        names[: len(shape)],
        axis_types=(AxisType.Auto,) * len(shape),
        devices=jax.devices()[: int(np.prod(shape))],
    )


def data(dtype, n=40):
    return data_of({}, n, dtype, seed=3)[:4]


@pytest.mark.parametrize(("name", "form"), SHARDED)
def test_equals_the_equations_in_float64(name, form):
    options, case = CASES[name]
    with jax.enable_x64(True):
        given = data_of(case, 40, seed=3)
        config = LossConfig(form=form, block_size=5, block_columns=6, **options)
        result = value_and_gradients(config, *given, mesh=mesh_of(2, 2))
        assert_close_to_oracle(case, result, given)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_exact_in_both_forms(name):
    options, case = CASES[name]
    if name == "uniform":
        options, case = {"name": "uniform"}, {"weights": ("uniform", 1.0)}
    assert resolve(LossConfig(**options)).kind == PRESETS[name].kind
    with jax.enable_x64(True):
        given = data_of(case, 12, seed=3)
        for form in ("gathered", "ring"):
            config = LossConfig(form=form, diagnostics=False, **options)
            result = value_and_gradients(config, *given, mesh=mesh_of(4))
            assert_close_to_oracle(case, result, given)


@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_targets_of_the_caller_are_split_by_rows(form):
    with jax.enable_x64(True):
        given = data_of({}, 40, seed=3)
        targets = np.random.default_rng(1).random((40, 40))
        config = LossConfig(form=form, weighted="both", block_size=2, block_columns=4)
        result = value_and_gradients(config, *given, mesh=mesh_of(4), targets=jnp.asarray(targets))
        assert_close_to_oracle({"weighted": BOTH}, result, given, targets=targets)


@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_equals_one_device_in_float32(form):
    arrays = data(jnp.float32)
    one = value_and_gradients(LossConfig(), *arrays)
    four = value_and_gradients(LossConfig(form=form), *arrays, mesh=mesh_of(4))
    assert float(four[0]) == pytest.approx(float(one[0]), rel=1e-6)
    for x, y in zip(four[2], one[2], strict=True):
        assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)
    for name, x in four[1].items():
        assert float(x) == pytest.approx(float(one[1][name]), rel=1e-5, abs=1e-5), name


def compiled(form, mesh, n=64, d=8):
    split = NamedSharding(mesh, P(mesh.axis_names))
    x = jax.ShapeDtypeStruct((n, d), jnp.float32, sharding=split)
    loss_fn = make_loss(LossConfig(form=form), mesh=mesh)
    gradient = jax.grad(lambda u, v: loss_fn(u, v, u, 1.0)[0], argnums=(0, 1))
    return jax.jit(gradient).lower(x, x).compile().as_text()


def test_the_ring_never_holds_all_columns():
    mesh = mesh_of(4)
    text = compiled("ring", mesh)
    assert "collective-permute" in text
    assert not re.search(r"f32\[64,8\]", text)
    assert re.search(r"f32\[64,8\]", compiled("gathered", mesh))


def test_the_same_inside_scan_and_checkpoint_over_a_mesh():
    u, v, p, _ = data(jnp.float32)
    mesh = mesh_of(2, 2)

    def loss(v):
        config = LossConfig(form="ring")
        return cwcl_loss(u, v, weights_from=p, logit_scale=2.0, config=config, mesh=mesh)[0]

    def accumulated(v):
        def body(total, x):
            return total + jax.checkpoint(loss)(x), None

        return jax.lax.scan(body, 0.0, jnp.stack([v, v]))[0] / 2

    plain, scanned = jax.jit(jax.grad(loss))(v), jax.jit(jax.grad(accumulated))(v)
    np.testing.assert_allclose(scanned, plain, rtol=1e-5, atol=1e-7)


def test_a_batch_that_does_not_split_evenly_is_an_error():
    u, v, p, _ = data(jnp.float32, n=42)
    with pytest.raises(ValueError, match="u has 42 rows, not divisible by the 4 devices"):
        cwcl_loss(u, v, weights_from=p, logit_scale=1.0, mesh=mesh_of(4))


def test_a_sharded_form_without_a_mesh_is_an_error():
    u, v, p, _ = data(jnp.float32)
    with pytest.raises(ValueError, match="form='ring' needs a mesh"):
        cwcl_loss(u, v, weights_from=p, logit_scale=1.0, config=LossConfig(form="ring"))


@pytest.mark.parametrize("form", ["auto", "gathered", "ring"])
def test_a_mesh_with_none_of_the_axes_is_an_error(form):
    mesh = mesh_of(4, names=("dp",))
    with pytest.raises(
        ValueError, match=r"axes \('dp',\), none of which is in axes=\('data', 'fsdp'\)"
    ):
        make_loss(LossConfig(form=form), mesh=mesh)
    make_loss(LossConfig(form=form), mesh=mesh, axes="dp")
    make_loss(LossConfig(form="dense"), mesh=mesh)
    if form == "auto":
        make_loss(LossConfig(), mesh=mesh_of(1, names=("dp",)))


@pytest.mark.parametrize(
    "form",
    [
        "gathered",
        "ring",
        pytest.param("dense", marks=pytest.mark.slow),
        pytest.param("fused", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_with_explicit_axes_gives_the_same(form):
    # The default of `jax.make_mesh`.
    mesh = jax.make_mesh((2, 2), ("data", "x"))
    assert mesh.axis_types == (AxisType.Explicit,) * 2
    u, v, p, _ = data(jnp.float32)
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (u, v, p)]
    one = value_and_gradients(LossConfig(), u, v, p, None)
    four = value_and_gradients(LossConfig(form=form), *sharded, None, mesh=mesh)
    assert float(four[0]) == pytest.approx(float(one[0]), rel=1e-6)
    for x, y in zip(four[2], one[2], strict=True):
        assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)
    with jax.set_mesh(mesh):
        eager = make_loss(LossConfig(form=form), mesh=mesh)(*sharded, np.log(14.0))[0]
    assert float(eager) == pytest.approx(float(one[0]), rel=1e-6)


def test_embeds_on_a_mesh_with_explicit_axes_need_that_mesh():
    split = NamedSharding(jax.make_mesh((4,), ("data",)), P("data"))
    u, v, p = (jax.device_put(x, split) for x in data(jnp.float32)[:3])
    with pytest.raises(ValueError, match=r"explicit axes, \('data',\): pass mesh="):
        cwcl_loss(u, v, weights_from=p, logit_scale=1.0)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("form", ["gathered", "ring"])
def test_it_runs_without_jit(form, kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(getattr(AxisType, kind),))
    split = NamedSharding(mesh, P("data"))
    u, v, p, _ = data(jnp.float32)
    given = tuple(jax.device_put(x, split) for x in (u, v, p))
    config = LossConfig(form=form, weight_function="calibrated0.5")
    loss_fn = make_loss(config, mesh=mesh)

    def loss(u, v, scale):
        return loss_fn(u, v, given[2], scale)[0]

    expected = value_and_gradients(LossConfig(weight_function="calibrated0.5"), u, v, p, None)
    with jax.set_mesh(mesh):
        scale = jnp.asarray(np.log(14.0), jnp.float32)
        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(*given[:2], scale)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
    for x, y in zip(gradients, expected[2], strict=False):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)
