import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cwcl_jax
from cwcl_jax.losses import (
    LossConfig,
    channel_profiles,
    contrastive_loss,
    cwcl_loss,
    make_loss,
    presets,
    sigmoid_loss,
)
from cwcl_jax.losses import options as options_module
from cwcl_jax.losses import torch_reference as theirs
from tests.losses import oracle


def arrays(n=8, d=6, k=5):
    return tuple(jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, n, d, k))


def call(u=None, v=None, p=None, config=None, logit_scale=1.0, weight_function=None, labels=None):
    """As `cwcl_loss`, whose annotated shapes the type checker of the tests would refuse first."""
    default = arrays()
    u, v, p = (x if y is None else y for x, y in zip(default, (u, v, p), strict=True))
    loss_fn = make_loss(config or LossConfig(), weight_function=weight_function)
    return loss_fn(u, v, p, logit_scale, labels=labels)


@pytest.mark.parametrize("name", ["cwcl", "contrastive", "sigmoid", "cellclip", "xclr"])
def test_presets_equal_pytorch_in_float64(name):
    u, v, p = oracle.embeds(5, 24, 7, 9)
    p = np.random.default_rng(0).normal(size=(24, 3, 5)) if name == "cellclip" else p
    loss, gradients = theirs.value_and_gradients(name, u, v, p, 2.0, "float64")
    with jax.enable_x64(True):
        loss_fn = make_loss(LossConfig(name=name, block_size=10))

        def ours(u, v, scale):
            return loss_fn(u, v, jnp.asarray(p), scale, -10.0)[0]

        value, ours_gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(
            jnp.asarray(u), jnp.asarray(v), jnp.asarray(2.0)
        )
        assert float(value) == pytest.approx(loss, rel=1e-12)
        for x, y in zip(ours_gradients, gradients, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-14)


def test_channel_profiles_have_the_mean_of_cosines_as_products():
    profiles = np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)
    flat = np.asarray(channel_profiles(jnp.asarray(profiles)))
    unit = profiles / np.linalg.norm(profiles, axis=-1, keepdims=True)
    expected = np.einsum("icf,jcf->ij", unit, unit) / 3
    np.testing.assert_allclose(flat @ flat.T, expected, atol=1e-6)


def test_a_function_of_the_caller_gives_the_weights():
    u, v, p = arrays()
    named = cwcl_loss(u, v, weights_from=p, logit_scale=2.0, weight_function="relu")[0]
    own = cwcl_loss(
        u, v, weights_from=p, logit_scale=2.0, weight_function=lambda c: jnp.maximum(c, 0) ** 2
    )[0]
    assert float(own) == pytest.approx(float(named), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"u": jnp.ones((7, 6))}, ValueError, "v has 8 rows but u has 7"),
        ({"p": jnp.ones((7, 6))}, ValueError, "weights_from has 7 rows but u has 8"),
        ({"v": jnp.ones((8, 5))}, ValueError, "u and v must have the same width, got 6 and 5"),
        ({"labels": jnp.ones(7, jnp.int32), "config": LossConfig(duplicates="masked")},
         ValueError, "labels has 7 rows"),
        ({"config": LossConfig(weighted="own")}, ValueError, "v_weights_from is missing"),
        ({"config": LossConfig(mix=(1.0, 0.5))}, ValueError, "progress is needed by mix"),
        ({"config": LossConfig(name="gist"), "p": jnp.ones((7, 6))}, ValueError,
         "weights_from has 7 rows"),
        ({"config": LossConfig(name="supervised")}, ValueError, "labels are needed"),
        ({"config": LossConfig(name="sigmoid")}, ValueError, "logit_bias is needed"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


def test_shapes_and_types_are_checked_without_the_type_checker():
    from cwcl_jax.losses import checks

    with pytest.raises(ValueError, match="u must have rank 2"):
        checks.check_embeds("u", jnp.ones(3))
    with pytest.raises(TypeError, match="v must be of a float type, got int32"):
        checks.check_embeds("v", jnp.ones((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="an empty batch"):
        checks.check_embeds("u", jnp.ones((0, 3)))
    with pytest.raises(ValueError, match=r"targets must have shape \(4, 4\)"):
        checks.check_targets(jnp.ones((4, 3)), 4)
    with pytest.raises(ValueError, match="logit_scale must be a float scalar"):
        checks.check_scalar("logit_scale", jnp.ones(2))


def test_missing_locked_embeds_are_named():
    u, v, _ = arrays()
    with pytest.raises(ValueError, match="weights_from is missing"):
        cwcl_loss(u, v, logit_scale=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"u": 2 * arrays()[0]}, "u is not normalised: row . has norm 2"),
        ({"v": arrays()[1].at[3, 1].set(jnp.nan)}, r"v is not finite, first in rows \[3\]"),
        ({"p": 2 * arrays()[2]}, "weights_from is not normalised"),
        ({"logit_scale": jnp.float32(jnp.inf)}, "logit_scale is not finite"),
        ({"weight_function": lambda c: c - 1}, "negative or undefined weight"),
        ({"weight_function": lambda c: 0 * c}, "a row without any positive weight"),
    ],
)
def test_debug_checks_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(config=LossConfig(debug_checks=True), **arguments)


def test_debug_checks_also_run_inside_jit():
    config = LossConfig(debug_checks=True)
    run = jax.jit(lambda u: call(u=u, config=config)[0])
    with pytest.raises(jax.errors.JaxRuntimeError, match="u is not normalised"):
        jax.block_until_ready(run(2 * arrays()[0]))


def test_mix_over_the_run_is_linear_between_its_numbers():
    def loss(mix, progress=None):
        u, v, p = arrays()
        return float(make_loss(LossConfig(mix=mix))(u, v, p, 1.0, progress=progress)[0])

    schedule = (1.0, 0.4, 0.8)
    for progress, share in ((0.0, 1.0), (0.25, 0.7), (0.5, 0.4), (1.0, 0.8)):
        assert loss(schedule, progress) == pytest.approx(loss((share,)), rel=1e-6)
    u, v, _ = arrays()
    assert loss((1.0,)) == pytest.approx(float(contrastive_loss(u, v, logit_scale=1.0)[0]))


def test_the_other_public_losses():
    u, v, _ = arrays()
    u64, v64, _ = oracle.embeds(0, 8, 6, 5)
    loss, _ = contrastive_loss(u, v, logit_scale=1.0)
    assert float(loss) == pytest.approx(oracle.contrastive(u64, v64, np.e), rel=1e-5)
    loss, _ = sigmoid_loss(u, v, logit_scale=1.0, logit_bias=-2.0)
    assert float(loss) == pytest.approx(oracle.sigmoid(u64, v64, np.e, -2.0), rel=1e-5)


@pytest.mark.parametrize("name", ["exp", "relu", "calibrated"])
def test_a_gradient_of_the_weights_that_a_tiled_form_lacks_is_an_error(name):
    options = {"weight_function": name, "detach_weights": False}
    with pytest.raises(ValueError, match=rf"{name}.*form='dense'"):
        LossConfig(**options)
    with pytest.raises(ValueError, match="your own weight function"):
        make_loss(LossConfig(detach_weights=False), weight_function=lambda cosine: cosine**2)
    make_loss(LossConfig(**options, form="dense"))
    make_loss(LossConfig(detach_weights=False))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "cellclip", "mix": (0.3,)},
        {"name": "cellclip_both"},
        {"weight_function": "centred", "weighted": "v_to_u"},
    ],
)
def test_the_gradient_through_the_weights_is_that_of_the_equations(options, monkeypatch):
    # An epsilon that counts: CellCLIP's own is as small as rounding.
    cellclip = dataclasses.replace(presets.PRESETS["cellclip"], row_sum_epsilon=0.3)
    monkeypatch.setattr(options_module, "PRESETS", presets.PRESETS | {"cellclip": cellclip})
    with jax.enable_x64(True):
        u, v, p = (jnp.asarray(x) for x in oracle.embeds(0, 24, 6, 9))
        q = jnp.asarray(oracle.embeds(1, 24, 6, 4)[2])

        def gradients(form):
            loss_fn = make_loss(LossConfig(form=form, detach_weights=False, **options))
            loss = lambda u, v, p, s, q: loss_fn(u, v, p, s, q=q)[0]  # noqa: E731
            return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(u, v, p, jnp.asarray(2.0), q)

        for ours, exact in zip(gradients("fused"), gradients("dense"), strict=True):
            np.testing.assert_allclose(ours, exact, rtol=1e-10, atol=1e-14)


def test_a_gradient_of_targets_is_dense_or_an_error():
    u, v, _ = arrays()
    with pytest.raises(ValueError, match=r"detach_weights=False with targets.*form='dense'"):
        make_loss(LossConfig(detach_weights=False))(u, v, None, 1.0, targets=jnp.eye(8))
    dense = make_loss(LossConfig(detach_weights=False, form="dense"))
    assert float(dense(u, v, None, 1.0, targets=jnp.eye(8))[0]) > 0


@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_weights_for_a_loss_without_any_are_errors(name):
    u, v, p = arrays()
    config = LossConfig(name=name)
    with pytest.raises(ValueError, match="weights_from has no effect"):
        cwcl_loss(u, v, weights_from=p, logit_scale=1.0, config=config)
    with pytest.raises(ValueError, match="leave targets out"):
        make_loss(config)(u, v, None, 1.0, -1.0, targets=jnp.eye(8))
    with pytest.raises(ValueError, match=r"weight_function=.*contradicts the preset"):
        make_loss(config, weight_function=jnp.abs)
    with pytest.raises(ValueError, match="weight_function='relu' contradicts the preset"):
        LossConfig(name=name, weight_function="relu")
    # The features of a training step come with every loss.
    assert float(make_loss(config)(u, v, p, 1.0, -1.0)[0]) > 0


def test_lists_and_wide_numpy_arrays_are_arrays():
    exact = oracle.embeds(0, 8, 6, 5)
    expected, _ = call()
    for given in (exact, [x.tolist() for x in exact]):
        # Warnings, such as those of float64 made narrow, are errors in the tests.
        loss, _ = make_loss(LossConfig())(*given, 1.0)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    for config in (LossConfig(weight_function="exp"), LossConfig(form="dense")):
        make_loss(config)(*exact, np.log(14.0))
    u, v, _ = arrays()
    given = make_loss(LossConfig())(u, v, None, 1.0, targets=np.eye(8).tolist())[0]
    assert float(given) == pytest.approx(oracle.contrastive(*exact[:2], np.e), rel=1e-5)
    supervised = make_loss(LossConfig(name="supervised"))
    given = supervised(u, v, None, 1.0, labels=list(range(8)))[0]
    assert float(given) == pytest.approx(oracle.contrastive(*exact[:2], np.e), rel=1e-5)
    with pytest.raises(ValueError, match="labels must be one integer for each pair, got bool"):
        supervised(u, v, None, 1.0, labels=[True] * 8)


def test_profiles_without_features_are_an_error():
    with pytest.raises(ValueError, match=r"weights_from has shape \(8, 3, 0\): an empty batch"):
        call(p=jnp.ones((8, 3, 0)))


@pytest.mark.parametrize(
    ("weighted", "zero", "message"),
    [
        ("u_to_v", "row", "gives a row without"),
        ("u_to_v", "column", ""),
        ("v_to_u", "row", ""),
        ("v_to_u", "column", "gives a column without"),
        ("both", "column", "gives a column without"),
    ],
)
def test_debug_checks_sum_the_weights_of_the_weighted_direction(weighted, zero, message):
    targets = jnp.ones((8, 8)).at[(3,) if zero == "row" else (slice(None), 3)].set(0)
    u, v, _ = arrays()
    loss_fn = make_loss(LossConfig(debug_checks=True, weighted=weighted))
    if message:
        with pytest.raises(ValueError, match=message):
            loss_fn(u, v, None, 1.0, targets=targets)
    else:
        assert np.isfinite(loss_fn(u, v, None, 1.0, targets=targets)[0])


def test_debug_checks_leave_masked_duplicates_out():
    # Row 0 has weight for its duplicate alone, which is masked.
    targets = jnp.eye(8).at[0, 0].set(0).at[0, 1].set(1)
    u, v, _ = arrays()
    labels = jnp.asarray([0, 0, 1, 2, 3, 4, 5, 6])
    loss_fn = make_loss(LossConfig(debug_checks=True, duplicates="masked"))
    with pytest.raises(ValueError, match="gives a row without"):
        loss_fn(u, v, None, 1.0, targets=targets, labels=labels)


def test_the_package_lists_its_names():
    assert {"cwcl_loss", "channel_profiles", "load_model"} <= set(dir(cwcl_jax))
    assert cwcl_jax.channel_profiles is channel_profiles


def test_arguments_that_do_nothing_are_refused():
    u, v, p = arrays()
    labels, targets = jnp.arange(8), jnp.eye(8)

    def refused(message, config=None, **given):
        with pytest.raises(ValueError, match=message):
            cwcl_loss(u, v, logit_scale=1.0, config=config, **given)

    refused("targets replace weight_function", weight_function="relu", targets=targets)
    refused("weights_from has no effect", weights_from=p, targets=targets)
    refused("labels has no effect", weights_from=p, labels=labels)
    refused("v_weights_from has no effect", weights_from=p, v_weights_from=p)
    refused("logit_bias has no effect", weights_from=p, logit_bias=-1.0)
    refused("progress has no effect", weights_from=p, progress=0.5)
    with pytest.raises(ValueError, match="labels has no effect"):
        contrastive_loss(u, v, logit_scale=1.0, labels=labels)


def test_a_parameter_of_ones_own_weight_function_is_trained_or_refused_by_name():
    u, v, p = arrays()

    def loss(sharpness, **options):
        return cwcl_loss(
            u, v, weights_from=p, logit_scale=1.0, config=LossConfig(**options),
            weight_function=lambda cosine: jnp.exp((cosine - 1) * sharpness),
        )[0]  # fmt: skip

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.grad(jax.jit(loss))):
        with pytest.raises(TypeError, match="weight_function depends on a parameter"):
            gradient(2.0)
    # As a constant it may be traced.
    assert float(jax.jit(loss)(2.0)) == pytest.approx(float(loss(2.0)), rel=1e-6)
    dense = {"form": "dense", "detach_weights": False}
    step = (float(loss(2.001, **dense)) - float(loss(1.999, **dense))) / 0.002
    assert float(jax.grad(lambda t: loss(t, **dense))(2.0)) == pytest.approx(step, rel=2e-2)


def ten_line_loss(u, v, logit_scale, labels):
    """A loss of a person's own: InfoNCE, and the share of labels that are 0."""
    logits = jnp.exp(logit_scale) * u @ v.T
    log_p = jax.nn.log_softmax(logits, axis=1)
    return -jnp.diagonal(log_p).mean(), {"zeros": (labels == 0).mean()}


def ten_line_weights(cosine):
    """A weight function of a person's own."""
    return jnp.maximum(cosine, 0) ** 2


def unknown_argument(u, v, teacher):
    return (u - v - teacher).sum()


def not_a_scalar(u):
    return u


HERE = "tests.losses.test_make:"


def test_a_loss_and_a_weight_function_by_module_and_name():
    u, v, p = arrays()
    loss_fn = make_loss(LossConfig(name=HERE + "ten_line_loss"))
    loss, reported = loss_fn(u, v, p, 1.0, labels=jnp.arange(8))
    exact = oracle.embeds(0, 8, 6, 5)
    expected = oracle.directional(np.e * exact[0] @ exact[1].T, np.eye(8))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(reported["zeros"]) == pytest.approx(1 / 8)
    named = make_loss(LossConfig(weight_function=HERE + "ten_line_weights"))(u, v, p, 1.0)[0]
    relu = make_loss(LossConfig(weight_function="relu2"))(u, v, p, 1.0)[0]
    assert float(named) == pytest.approx(float(relu), rel=1e-6)
    with pytest.raises(
        ValueError, match=r"an argument 'teacher'; the arguments of a loss are u, v, p"
    ):
        make_loss(LossConfig(name=HERE + "unknown_argument"))
    with pytest.raises(ValueError, match="must return a scalar"):
        make_loss(LossConfig(name=HERE + "not_a_scalar"))(u, v, p, 1.0)
    with pytest.raises(ValueError, match="your own loss, which does not read mix"):
        LossConfig(name=HERE + "ten_line_loss", mix=(0.5,))


def test_labels_that_are_words_are_refused():
    u, v, _ = arrays()
    words = np.array(["a", "b"] * (len(u) // 2) + ["c"] * (len(u) % 2))
    with pytest.raises(ValueError, match="labels must be integers, not <U1"):
        cwcl_loss(u, v, labels=words, logit_scale=2.0, config=LossConfig(name="supervised"))


def test_values_that_are_known_are_checked_and_tracers_are_not():
    u, v, p = (jnp.asarray(x, jnp.bfloat16) for x in oracle.embeds(0, 8, 5))
    given = {"weights_from": p, "logit_scale": 2.0}
    cwcl_loss(u, v, **given)
    with pytest.raises(ValueError, match=r"row 2 of v has norm 3.*divide v by its norms"):
        cwcl_loss(u, v.at[2].multiply(3), **given)
    with pytest.raises(ValueError, match="row 0 of weights_from has norm 4"):
        cwcl_loss(u, v, weights_from=4 * p, logit_scale=2.0)
    cwcl_loss(u, v, weights_from=4 * p, logit_scale=2.0, weight_function="distance")  # of raw rows
    with pytest.raises(ValueError, match="row 1 of u has norm nan"):
        cwcl_loss(u.at[1, 0].set(jnp.nan), v, **given)
    with pytest.raises(ValueError, match=r"of 14\.3 give its log"):
        cwcl_loss(u, v, weights_from=p, logit_scale=14.3)
    jax.jit(lambda u: cwcl_loss(u, v, **given)[0])(3 * u)
