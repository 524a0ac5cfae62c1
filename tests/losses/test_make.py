import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.losses import (
    LossConfig,
    channel_profiles,
    contrastive_loss,
    cwcl_loss,
    make_loss,
    sigmoid_loss,
)
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


@pytest.mark.parametrize("name", ["cwcl", "contrastive", "sigmoid", "cellclip", "astroclip"])
def test_presets_equal_pytorch_in_float64(name):
    u, v, p = oracle.embeds(5, 24, 7, 9)
    p = np.random.default_rng(0).normal(size=(24, 3, 5)) if name == "cellclip" else p
    loss, gradients = theirs.value_and_gradients(name, u, v, p, 2.0, "float64")
    with jax.enable_x64(True):
        loss_fn = make_loss(LossConfig(name=name, block_size=10))

        def ours(u, v, scale):
            return loss_fn(u, v, jnp.asarray(p), scale, -10.0)[0]

        value, ours_gradients = jax.value_and_grad(ours, (0, 1, 2))(
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


def test_mean_is_the_sum_over_one_plus_the_reverse_weight():
    total = call(config=LossConfig(reverse_weight=3.0))[0]
    mean = call(config=LossConfig(reverse_weight=3.0, reduction="mean"))[0]
    assert float(mean) == pytest.approx(float(total) / 4, rel=1e-6)


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
        make_loss(LossConfig(**options))
    with pytest.raises(ValueError, match="your own weight function"):
        make_loss(LossConfig(detach_weights=False), weight_function=lambda cosine: cosine**2)
    make_loss(LossConfig(**options, form="dense"))
    make_loss(LossConfig(detach_weights=False))
