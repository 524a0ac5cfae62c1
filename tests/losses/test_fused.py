import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cwcl_jax.losses import LossConfig, cwcl_loss, make_loss
from tests.losses import oracle

CASES = {
    "paper": {},
    "both directions weighted": {"weighted": "both"},
    "reverse weighted, mean": {"weighted": "v_to_u", "reduction": "mean", "reverse_weight": 0.3},
    "one direction": {"direction": "u_to_v"},
    "contrastive": {"name": "contrastive"},
    "supervised": {"name": "supervised"},
    "uniform": {"weight_function": "uniform", "weight_offdiagonal": 0.5},
    "centred": {"weight_function": "centred"},
    "exp": {"weight_function": "exp", "weighted": "both"},
    "relu squared": {"weight_function": "relu"},
    "relu power": {"weight_function": "relu", "weight_power": 3.5},
    "calibrated": {"weight_function": "calibrated"},
    "calibrated relu": {"weight_function": "calibrated_relu", "target_positives": 3.0},
    "calibrated, duplicates masked": {"weight_function": "calibrated", "duplicates": "masked"},
    "calibrated relu, duplicates as positives": {
        "weight_function": "calibrated_relu",
        "duplicates": "positives",
        "target_positives": 4.0,
    },
    "cellclip": {"name": "cellclip"},
    "astroclip": {"name": "astroclip", "reverse_weight": 0.5},
    "duplicates as positives": {"duplicates": "positives", "row_sum_epsilon": 1e-3},
    "duplicates masked": {"duplicates": "masked", "weighted": "both"},
    "contrastive, duplicates as positives": {"name": "contrastive", "duplicates": "positives"},
    "contrastive, duplicates masked": {"name": "contrastive", "duplicates": "masked"},
    "sigmoid": {"name": "sigmoid"},
    "sigmoid, duplicates as positives": {"name": "sigmoid", "duplicates": "positives"},
    "sigmoid, duplicates masked": {"name": "sigmoid", "duplicates": "masked"},
    "without diagnostics": {"diagnostics": False},
}


def arrays(n=37, d=11, k=7, dtype=jnp.float64, seed=0):
    u, v, p = (jnp.asarray(x, dtype) for x in oracle.embeds(seed, n, d, k))
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, n // 3, n), jnp.int32)
    return u, v, p, labels


def value_and_gradients(config, u, v, p, labels, scale=14.0, mesh=None, targets=None):
    loss_fn = make_loss(config, mesh=mesh)
    u, v, p = (jnp.asarray(x) for x in (u, v, p))

    def function(u, v, logit_scale, bias):
        return loss_fn(u, v, p, logit_scale, bias, labels=labels, targets=targets)

    run = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True))
    wide = jnp.promote_types(u.dtype, jnp.float32)
    scalars = (jnp.asarray(np.log(scale), wide), jnp.asarray(-3.0, wide))
    (loss, diagnostics), gradients = run(u, v, *scalars)
    return loss, diagnostics, [np.asarray(g) for g in gradients]


def assert_equal(a, b, value: float, gradient: float):
    """Values, diagnostics, and gradients relative to their norm."""
    assert abs(float(a[0] - b[0])) <= value * max(1, abs(float(b[0])))
    assert set(a[1]) == set(b[1])
    for name in a[1]:
        difference = abs(float(a[1][name] - b[1][name]))
        assert difference <= 10 * value * max(1, abs(float(b[1][name]))), name
    for x, y in zip(a[2], b[2], strict=True):
        assert np.linalg.norm(x - y) <= gradient * np.linalg.norm(y)


def assert_close_to_oracle(options, result, data, scale=14.0, targets=None, tolerance=1e-12):
    """Value and gradients against matrices written out in numpy."""
    u, v, p, labels = (np.asarray(x) for x in data)
    loss, exact = oracle.solve(options, u, v, p, labels, scale, -3.0, targets)
    assert float(result[0]) == pytest.approx(loss, rel=tolerance)
    for x, y in zip(result[2], exact, strict=True):
        if np.ndim(y) or options.get("name") == "sigmoid":
            assert np.linalg.norm(x - y) <= 10 * tolerance * np.linalg.norm(y)
        else:
            assert float(x) == pytest.approx(float(y), rel=1e-9, abs=10 * tolerance)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_the_equations_in_float64(options):
    with jax.enable_x64(True):
        data = arrays()
        # 37 rows in tiles of 8: the last one is ragged. The last columns are 16 + 5, since 5 would
        # be fewer than a tile has rows.
        config = LossConfig(form="fused", block_size=8, block_columns=16, **options)
        fused = value_and_gradients(config, *data)
        assert_close_to_oracle(options, fused, data)


def test_any_targets_of_the_caller():
    with jax.enable_x64(True):
        data = arrays()
        targets = np.random.default_rng(1).random((37, 37))
        config = LossConfig(weighted="both", block_size=8, block_columns=8)
        result = value_and_gradients(config, *data, targets=jnp.asarray(targets))
        assert_close_to_oracle({"weighted": "both"}, result, data, targets=targets)


DENSE = ("paper", "calibrated", "cellclip", "duplicates masked", "contrastive", "sigmoid")


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_form_and_its_diagnostics_agree_with_the_tiled_form(name):
    with jax.enable_x64(True):
        data = arrays()
        dense = value_and_gradients(LossConfig(form="dense", **CASES[name]), *data)
        fused = value_and_gradients(LossConfig(form="fused", block_size=24, **CASES[name]), *data)
        assert_equal(fused, dense, 1e-12, 1e-11)


@pytest.mark.parametrize("n", [2, 8, 9, 16])
def test_any_number_of_pairs(n):
    with jax.enable_x64(True):
        u, v, p = (jnp.asarray(x) for x in oracle.embeds(n, n, 5))
        config = LossConfig(block_size=8)
        run = jax.jit(lambda u: cwcl_loss(u, v, weights_from=p, logit_scale=2.0, config=config)[0])
        loss = run(u)
        expected = oracle.cwcl(np.array(u), np.array(v), np.array(p), np.exp(2.0))
        assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_one_pair_alone_has_no_loss_and_no_gradient():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 1, 5))
    loss, diagnostics, gradients = value_and_gradients(LossConfig(), u, v, p, None)
    assert float(loss) == 0
    assert float(diagnostics["effective_positives"]) == 1
    assert all(not np.any(g) for g in gradients)


@pytest.mark.parametrize(("spread", "scale"), [(1.0, 14.0), (1.0, 100.0), (0.1, 100.0)])
@pytest.mark.parametrize("name", ["cwcl", "contrastive", "sigmoid"])
def test_float32_is_close_to_float64(name, spread, scale):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 32))
    u, v = (
        oracle.unit_rows(base * (spread < 1) + spread * rng.normal(size=(64, 32))) for _ in "uv"
    )
    u, v = (x.astype(np.float32) for x in (u, v))
    narrow = value_and_gradients(LossConfig(name=name, block_size=24), u, v, u, None, scale)
    with jax.enable_x64(True):
        exact = (jnp.asarray(x, jnp.float64) for x in (u, v, u))
        wide = value_and_gradients(LossConfig(name=name, form="dense"), *exact, None, scale)
    assert abs(float(narrow[0]) - float(wide[0])) <= 1e-5 * max(1, float(wide[0]))
    for x, y in zip(narrow[2][:2], wide[2][:2], strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y)


@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_almost_identical_rows_lose_no_more_than_the_dense_form(scale):
    # The gradient here is a difference of numbers that agree in three digits, so the dense
    # float32 form is off by 1e-4 of its norm too: rounding of the logits, not of the method.
    rng = np.random.default_rng(1)
    base = rng.normal(size=(1, 32))
    u, v = (
        oracle.unit_rows(base + 1e-3 * rng.normal(size=(64, 32))).astype(np.float32) for _ in "uv"
    )
    fused, dense = (
        value_and_gradients(LossConfig(form=form, block_size=24), u, v, u, None, scale)
        for form in ("fused", "dense")
    )
    with jax.enable_x64(True):
        exact = (jnp.asarray(x, jnp.float64) for x in (u, v, u))
        wide = value_and_gradients(LossConfig(form="dense"), *exact, None, scale)
    assert abs(float(fused[0]) - float(wide[0])) <= 1e-5 * float(wide[0])
    for x, y, z in zip(fused[2][:2], dense[2][:2], wide[2][:2], strict=True):
        assert np.abs(x - z).max() <= 1e-5
        assert np.linalg.norm(x - z) <= 5 * np.linalg.norm(y - z)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"weight_function": "exp"}, {"name": "sigmoid"}])
def test_narrow_inputs_give_narrow_gradients_of_wide_sums(dtype, options):
    u, v, p, _ = arrays(n=40, d=32, k=16, dtype=dtype)
    narrow = value_and_gradients(LossConfig(block_size=16, **options), u, v, p, None)
    wide = (x.astype(jnp.float32) for x in (u, v, p))
    exact = value_and_gradients(LossConfig(form="dense", **options), *wide, None)
    assert narrow[0].dtype == jnp.float32
    # Products of narrow numbers are exact in float32: only the gradients are rounded.
    assert float(narrow[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    for x, y in zip(narrow[2][:2], exact[2][:2], strict=True):
        assert x.dtype == dtype
        error = np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)
        assert error < (8e-3 if dtype == jnp.bfloat16 else 2e-3)


def test_scaled_cotangents_do_not_underflow_in_float16():
    u, v, p, _ = arrays(n=40, d=32, k=16, dtype=jnp.float16)

    def gradient(factor):
        loss = lambda v: factor * cwcl_loss(u, v, weights_from=p, logit_scale=2.0)[0]  # noqa: E731
        return np.asarray(jax.jit(jax.grad(loss))(v), np.float32)

    np.testing.assert_allclose(gradient(1024.0) / 1024, gradient(1.0), rtol=2e-3, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    with jax.enable_x64(True):
        u, v, p, _ = arrays(n=9, d=4, k=3)

        def loss(u, v, logit_scale):
            config = LossConfig(block_size=4, weight_function="exp", weight_temperature=0.5)
            return cwcl_loss(u, v, weights_from=p, logit_scale=logit_scale, config=config)[0]

        check_grads(jax.jit(loss), (u, v, jnp.asarray(1.5)), order=1, modes=["rev"], rtol=1e-6)


def matrix_products(function, *arguments) -> int:
    return len(re.findall("dot_general", jax.jit(function).lower(*arguments).as_text()))


def test_nothing_is_computed_for_the_side_without_gradient():
    u, v, p, _ = arrays(n=64, d=8, k=8, dtype=jnp.float32)
    scale = jnp.float32(1.0)

    def loss(u, v, scale):
        config = LossConfig(block_size=16, diagnostics=False, weight_function="exp")
        return cwcl_loss(u, v, weights_from=p, logit_scale=scale, config=config)[0]

    def over_scan(u, v, scale):
        return jax.lax.scan(lambda c, x: (c + loss(x, v, scale), None), 0.0, u[None])[0]

    def locked(u, v, scale):
        return loss(jax.lax.stop_gradient(u), v, scale)

    both = matrix_products(jax.grad(loss, (0, 1, 2)), u, v, scale)
    for function in (loss, jax.jit(loss), jax.checkpoint(loss), over_scan, locked):
        assert matrix_products(jax.grad(function, (1, 2)), u, v, scale) == both - 1
    # Forward: logits and weights; backward: both again and dv.
    assert both - 1 == 5


def test_the_paper_s_weights_need_no_product_of_all_pairs_of_p():
    u, v, p, _ = arrays(n=64, d=8, k=6, dtype=jnp.float32)

    def loss(v):
        config = LossConfig(diagnostics=False)
        return cwcl_loss(u, v, weights_from=p, logit_scale=1.0, config=config)[0]

    text = jax.jit(jax.grad(loss)).lower(v).as_text()
    shapes = re.findall(r"dot_general.*-> tensor<(\w+)xf32>", text)
    # Logits in the backward rule, dv, and the moment's two products; row sums.
    assert sorted(shapes) == sorted(["64x64", "64x64", "64x8", "6x8", "64x8", "64"])


def test_memory_is_linear_in_the_number_of_pairs():
    def temporary_bytes(n):
        x = jax.ShapeDtypeStruct((n, 64), jnp.float32)
        loss_fn = make_loss(LossConfig(block_size=64, block_columns=512))
        gradient = jax.grad(lambda u, v: loss_fn(u, v, u, 1.0)[0], argnums=(0, 1))
        return jax.jit(gradient).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2048), temporary_bytes(8192)
    assert large < 4.2 * small
    assert large < 8192 * 8192 * 4 / 8


def test_the_same_under_checkpoint_and_inside_scan():
    u, v, p, _ = arrays(dtype=jnp.float32)

    def loss(u, v):
        config = LossConfig(block_size=16)
        return cwcl_loss(u, v, weights_from=p, logit_scale=2.0, config=config)[0]

    def accumulated(u, v):
        parts = (jnp.stack([u, 2 * u - u]), jnp.stack([v, v]))
        total, _ = jax.lax.scan(lambda c, x: (c + loss(*x), None), 0.0, parts)
        return total / 2

    plain = jax.jit(jax.grad(loss, (0, 1)))(u, v)
    for function in (jax.checkpoint(loss), accumulated, jax.jit(loss)):
        for x, y in zip(jax.jit(jax.grad(function, (0, 1)))(u, v), plain, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_it_is_traced_once_for_changing_values():
    traces = []
    u, v, p, _ = arrays(dtype=jnp.float32)

    @jax.jit
    def loss(u, v, logit_scale):
        traces.append(1)
        return cwcl_loss(u, v, weights_from=p, logit_scale=logit_scale)[0]

    for scale in (1.0, 2.0, 3.0):
        loss(u, v, jnp.float32(scale))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, u: jax.jvp(f, (u,), (u,)),
        lambda f, u: jax.jacfwd(f)(u),
        lambda f, u: jax.hessian(f)(u),
        lambda f, u: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())(u),
    ],
    ids=["jvp", "jacfwd", "hessian", "reverse over reverse"],
)
@pytest.mark.parametrize("name", ["cwcl", "sigmoid"])
def test_other_derivatives_are_an_error_that_tells_what_to_use(derivative, name):
    u, v, p, _ = arrays(dtype=jnp.float32)
    loss_fn = make_loss(LossConfig(name=name))
    with pytest.raises(TypeError, match="form='dense'"):
        derivative(lambda u: loss_fn(u, v, p, 1.0, 0.0)[0], u)
