import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cwcl_jax.losses import LossConfig, cwcl_loss, make_loss
from tests.losses import oracle

BOTH = ("rows", "columns")
CELL = {"weights": ("affine",), "epsilon": 1e-8}
# What the package is told, and what the oracle is.
CASES: dict[str, tuple[dict, dict]] = {
    "cwcl": ({}, {"weights": ("affine",)}),
    "both directions weighted": ({"weighted": "both"}, {"weights": ("affine",), "weighted": BOTH}),
    "reverse weighted": (
        {"weighted": "v_to_u", "direction_weights": (0.8, 0.2)},
        {"weights": ("affine",), "weighted": ("columns",), "directions": (0.8, 0.2)},
    ),
    "one direction": (
        {"direction_weights": (1.0, 0.0)},
        {"weights": ("affine",), "directions": (1.0, 0.0)},
    ),
    "mixed": ({"mix": (0.3,)}, {"weights": ("affine",), "mix": 0.3}),
    "mixed relu, both": (
        {"mix": (0.3,), "weight_function": "relu2", "weighted": "both"},
        {"weights": ("relu", 2), "mix": 0.3, "weighted": BOTH},
    ),
    "contrastive": ({"name": "contrastive"}, {}),
    "supervised": ({"name": "supervised"}, {"weights": ("labels", 0.0), "weighted": BOTH}),
    "uniform": ({"weight_function": "uniform0.5"}, {"weights": ("uniform", 0.5)}),
    "centred": ({"weight_function": "centred"}, {"weights": ("centred",)}),
    "exp": (
        {"weight_function": "exp0.1", "weighted": "both"},
        {"weights": ("exp", 0.1), "weighted": BOTH},
    ),
    "relu squared": ({"weight_function": "relu"}, {"weights": ("relu", 2)}),
    "relu power": ({"weight_function": "relu3.5"}, {"weights": ("relu", 3.5)}),
    "calibrated": ({"weight_function": "calibrated"}, {"weights": ("calibrated", 0.5)}),
    "calibrated relu": (
        {"weight_function": "calibrated_relu3"},
        {"weights": ("calibrated_relu", 3.0)},
    ),
    "calibrated, duplicates masked": (
        {"weight_function": "calibrated0.5", "duplicates": "masked"},
        {"weights": ("calibrated", 0.5), "mask": "labels"},
    ),
    "calibrated relu, duplicates as positives": (
        {"weight_function": "calibrated_relu4", "duplicates": "positives"},
        {"weights": ("calibrated_relu", 4.0), "positives": True},
    ),
    "cellclip": ({"name": "cellclip"}, CELL),
    "cellclip, mixed": ({"name": "cellclip", "mix": (0.4,)}, CELL | {"mix": 0.4}),
    "cellclip_both": (
        {"name": "cellclip_both"},
        {"weights": ("affine",), "weighted": BOTH, "own": True},
    ),
    "relu of each modality": (
        {"weighted": "own", "weight_function": "relu"},
        {"weights": ("relu", 2), "weighted": BOTH, "own": True},
    ),
    "calibrated of each modality": (
        {"weighted": "own", "weight_function": "calibrated0.4"},
        {"weights": ("calibrated", 0.4), "weighted": BOTH, "own": True},
    ),
    "duplicates as positives": (
        {"duplicates": "positives"},
        {"weights": ("affine",), "positives": True},
    ),
    "duplicates masked": (
        {"duplicates": "masked", "weighted": "both"},
        {"weights": ("affine",), "mask": "labels", "weighted": BOTH},
    ),
    "contrastive, duplicates as positives": (
        {"name": "contrastive", "duplicates": "positives"},
        {"weights": ("labels", 0.0), "weighted": BOTH},
    ),
    "contrastive, duplicates masked": (
        {"name": "contrastive", "duplicates": "masked"},
        {"mask": "labels"},
    ),
    "gist": ({"name": "gist", "duplicates": "absolute0.6"}, {"mask": ("absolute", 0.6)}),
    "gist, relative, weighted": (
        {"duplicates": "relative0.55", "weight_function": "relu", "weighted": "both"},
        {"mask": ("relative", 0.55), "weights": ("relu", 2), "weighted": BOTH},
    ),
    "softclip": (
        {"name": "softclip"},
        {
            "weights": ("exp", 0.1),
            "weighted": BOTH,
            "own": True,
            "mix": 0.5,
            "directions": (0.5, 0.5),
            "terms": {"negatives": 0.5},
        },
    ),
    "negatives alone, masked": (
        {"weight_function": "relu", "duplicates": "masked", "terms": ("negatives=0.7",)},
        {"weights": ("relu", 2), "mask": "labels", "terms": {"negatives": 0.7}},
    ),
    "negatives alone, affine": (
        {"terms": ("negatives=0.7",)},
        {"weights": ("affine",), "terms": {"negatives": 0.7}},
    ),
    "xclr": ({"name": "xclr"}, {"weights": ("exp", 0.1), "weighted": BOTH}),
    "morphoclip": (
        {"name": "morphoclip"},
        {
            "weights": ("labels", 0.5),
            "weighted": BOTH,
            "directions": (0.5, 0.5),
            "terms": {"replicates": 0.1},
            "sets": True,
        },
    ),
    "cyclip": (
        {"name": "cyclip", "terms": ("cyclic_within=0.25", "cyclic_across=0.5")},
        {"directions": (0.5, 0.5), "terms": {"cyclic_within": 0.25, "cyclic_across": 0.5}},
    ),
    "regression": ({"name": "regression"}, {"alone": True, "terms": {"cosine": 1.0}}),
    "regression as a second term": (
        {"terms": ("squared=0.3",)},
        {"weights": ("affine",), "terms": {"squared": 0.3}},
    ),
    "astroclip": ({"name": "astroclip"}, {"directions": (0.5, 0.5)}),
    "sigmoid": ({"name": "sigmoid"}, {"sigmoid": (1, 1)}),
    "sigmoid, duplicates as positives": (
        {"name": "sigmoid", "duplicates": "positives"},
        {"sigmoid": (1, 1), "weights": ("labels", 0.0)},
    ),
    "sigmoid, duplicates masked": (
        {"name": "sigmoid", "duplicates": "masked"},
        {"sigmoid": (1, 1), "mask": "labels"},
    ),
    "s2l": (
        {"name": "s2l", "weight_function": "distance6_0.1"},
        {"sigmoid": (1.7, 0.75), "weights": ("distance", 6.0, 0.1), "raw": True},
    ),
    "s2l, mixed, masked, replicates": (
        {
            "name": "s2l",
            "weight_function": "distance6_0.1",
            "mix": (0.2,),
            "duplicates": "masked",
            "terms": ("replicates=0.5",),
        },
        {
            "sigmoid": (1.7, 0.75),
            "weights": ("distance", 6.0, 0.1),
            "mix": 0.2,
            "mask": "labels",
            "raw": True,
            "terms": {"replicates": 0.5},
        },
    ),
    "without diagnostics": ({"diagnostics": False}, {"weights": ("affine",)}),
}


def arrays(n=37, d=11, k=7, dtype=jnp.float64, seed=0):
    u, v, p = (jnp.asarray(x, dtype) for x in oracle.embeds(seed, n, d, k))
    labels = jnp.asarray(np.random.default_rng(seed).integers(0, n // 3, n), jnp.int32)
    return u, v, p, labels


def data_of(case, n=37, dtype=jnp.float64, seed=0):
    """u, v, p, labels and q as a case reads them: features as they are, or sets of labels."""
    u, v, p, labels = arrays(n, dtype=dtype, seed=seed)
    rng = np.random.default_rng(seed + 1)
    q = jnp.asarray(oracle.unit_rows(rng.normal(size=(n, 5)) + 0.4), dtype)
    if "raw" in case:
        p = p * jnp.asarray(rng.uniform(0.5, 3, size=(n, 1)), dtype) + 4
    if "sets" in case:
        # A perturbation and up to two genes, the first of them by the perturbation.
        genes = np.stack([100 + np.asarray(labels) % 5, rng.integers(100, 108, n)], axis=1)
        genes[::3, 1] = -1
        labels = jnp.concatenate([labels[:, None], jnp.asarray(genes, jnp.int32)], axis=1)
    return u, v, p, labels, q


def value_and_gradients(config, u, v, p, labels, q=None, scale=14.0, mesh=None, targets=None):
    loss_fn = make_loss(config, mesh=mesh)
    u, v, p = (jnp.asarray(x) for x in (u, v, p))

    def function(u, v, logit_scale, bias, p, **others):
        return loss_fn(u, v, p, logit_scale, bias, **others)

    run = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True))
    wide = jnp.promote_types(u.dtype, jnp.float32)
    scalars = (jnp.asarray(np.log(scale), wide), jnp.asarray(-3.0, wide))
    # As arguments and not as constants: equal shapes are one program.
    (loss, diagnostics), gradients = run(u, v, *scalars, p, labels=labels, targets=targets, q=q)
    return loss, diagnostics, [np.asarray(g) for g in gradients]


def assert_equal(a, b, value: float, gradient: float):
    """Values, diagnostics, and gradients relative to their norm."""
    assert abs(float(a[0] - b[0])) <= value * max(1, abs(float(b[0])))
    assert set(a[1]) == set(b[1])
    for name in a[1]:
        difference = abs(float(a[1][name] - b[1][name]))
        assert difference <= 10 * value * max(1, abs(float(b[1][name]))), name
    for x, y in zip(a[2], b[2], strict=True):
        assert np.linalg.norm(x - y) <= gradient * max(np.linalg.norm(y), 1e-3)


def assert_close_to_oracle(case, result, data, scale=14.0, targets=None, tolerance=1e-12):
    """Value and gradients against dense matrices, differentiated by PyTorch."""
    u, v, p, labels, q = data
    loss, exact = oracle.solve(case, u, v, p, q, labels, scale, -3.0, targets)
    assert float(result[0]) == pytest.approx(loss, rel=tolerance)
    for x, y in zip(result[2], exact, strict=True):
        if np.ndim(y) or "sigmoid" in case:
            assert np.linalg.norm(x - y) <= 10 * tolerance * max(np.linalg.norm(y), tolerance)
        else:
            assert float(x) == pytest.approx(float(y), rel=1e3 * tolerance, abs=10 * tolerance)


@functools.cache
def in_tiles(name):
    """A case's loss, diagnostics and gradients in float64."""
    options, case = CASES[name]
    with jax.enable_x64(True):
        # 37 rows in tiles of 8: the last one is ragged. The last columns are 16 + 5, since 5 would
        # be fewer than a tile has rows.
        config = LossConfig(form="fused", block_size=8, block_columns=16, **options)
        return value_and_gradients(config, *data_of(case))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_equations_in_float64(name):
    case = CASES[name][1]
    with jax.enable_x64(True):
        assert_close_to_oracle(case, in_tiles(name), data_of(case))


def test_any_targets_of_the_caller():
    with jax.enable_x64(True):
        data = data_of({})
        targets = np.random.default_rng(1).random((37, 37))
        config = LossConfig(weighted="both", block_size=8, block_columns=8)
        result = value_and_gradients(config, *data, targets=jnp.asarray(targets))
        assert_close_to_oracle({"weighted": BOTH}, result, data, targets=targets)


@pytest.mark.parametrize("name", CASES)
def test_the_dense_form_and_its_diagnostics_agree_with_the_tiled_form(name):
    options, case = CASES[name]
    with jax.enable_x64(True):
        data = data_of(case)
        dense = value_and_gradients(LossConfig(form="dense", **options), *data)
        assert_equal(in_tiles(name), dense, 1e-12, 1e-11)


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
    narrow = value_and_gradients(LossConfig(name=name, block_size=24), u, v, u, None, scale=scale)
    with jax.enable_x64(True):
        exact = (jnp.asarray(x, jnp.float64) for x in (u, v, u))
        wide = value_and_gradients(LossConfig(name=name, form="dense"), *exact, None, scale=scale)
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
        value_and_gradients(LossConfig(form=form, block_size=24), u, v, u, None, scale=scale)
        for form in ("fused", "dense")
    )
    with jax.enable_x64(True):
        exact = (jnp.asarray(x, jnp.float64) for x in (u, v, u))
        wide = value_and_gradients(LossConfig(form="dense"), *exact, None, scale=scale)
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
            config = LossConfig(block_size=4, weight_function="exp0.5")
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


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_pairs_beyond_int32_are_traced(name):
    n = 2**17
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype),
        data_of(CASES[name][1], n=6, dtype=jnp.float32),
    )
    loss_fn = make_loss(LossConfig(**CASES[name][0]))

    def loss(u, v, p, labels, q):
        return loss_fn(u, v, p, 2.66, -3.0, labels=labels, q=q)

    value, diagnostics = jax.eval_shape(jax.grad(loss, argnums=(0, 1), has_aux=True), *shapes)
    assert [x.shape for x in value] == [shapes[0].shape, shapes[1].shape]
    assert all(x.shape == () for x in diagnostics.values())


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
