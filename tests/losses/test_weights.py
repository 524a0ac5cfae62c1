import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cwcl_jax.losses import LossConfig, cwcl_loss, make_loss, torch_reference, weights
from tests.losses import oracle


def locked(n, seed=0):
    return jnp.asarray(oracle.embeds(seed, n, 24)[2], jnp.float32)


def diagnostics(p, labels=None, **options):
    u, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(1, len(p), 8))
    config = LossConfig(**options)

    @jax.jit
    def found(u, v, p):
        return cwcl_loss(u, v, weights_from=p, logit_scale=2.0, labels=labels, config=config)[1]

    return found(u, v, p)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 2e-15), ("float32", 5e-7)])
@pytest.mark.parametrize("least", [0.75, 0.1])
def test_weights_of_distances_are_the_arc_tangent_s(least, dtype, tolerance):
    with jax.enable_x64(True):
        squared = jnp.concatenate([jnp.linspace(0, 1, 500), jnp.asarray([3.0, 1e3, 1e20])])
        found = weights.ArcTangent(least)(squared.astype(dtype), 1 / 0.3)
        exact = 1 - np.arctan(np.asarray(squared, np.float64) / 0.3) * 4 / np.pi
        sure = np.abs(exact - least) > 1e-6
        np.testing.assert_allclose(
            np.asarray(found)[sure], np.where(exact < least, 0, exact)[sure], atol=tolerance
        )


@pytest.mark.parametrize("function", ["calibrated", "calibrated_relu"])
def test_a_calibrated_kernel_keeps_the_diagonal_whatever_the_batch(function):
    for n in (16, 96):
        d = diagnostics(locked(n), weight_function=f"{function}0.4")
        assert float(d["diagonal_weight"]) == pytest.approx(0.4, rel=1e-4)


def test_a_fixed_kernel_flattens_as_the_batch_grows():
    shares = [
        float(diagnostics(locked(n), weight_function="relu")["diagonal_weight"]) for n in (16, 96)
    ]
    assert shares[1] < 0.6 * shares[0]


def test_a_kernel_can_keep_the_effective_number_of_positives():
    d = diagnostics(locked(96), weight_function="calibrated5")
    assert float(d["effective_positives"]) == pytest.approx(5, rel=1e-4)


def test_a_sample_of_rows_calibrates_a_large_batch():
    # 1,000 rows: every eighth, 125 of them.
    d = diagnostics(locked(1000), weight_function="calibrated0.3")
    assert float(d["diagonal_weight"]) == pytest.approx(0.3, abs=0.05)


def test_centred_embeds_have_no_mean_and_unit_norm():
    centred = np.asarray(weights.centre(locked(40) + 1.0))
    np.testing.assert_allclose(np.linalg.norm(centred, axis=1), 1, rtol=1e-5)
    assert np.abs(centred.mean(axis=0)).max() < 0.1


def test_a_function_that_is_not_entry_by_entry_is_an_error():
    with pytest.raises(ValueError, match="must work elementwise"):
        weights.UserFunction(lambda c: c.sum(axis=1))(jnp.ones((2, 2)), 1.0)


@pytest.mark.parametrize(
    ("options", "figure", "value"),
    [
        ({"weight_function": "calibrated"}, "diagonal_weight", 0.5),
        ({"weight_function": "calibrated_relu0.3"}, "diagonal_weight", 0.3),
        ({"weight_function": "calibrated5"}, "effective_positives", 5.0),
        ({"weight_function": "calibrated0.2", "duplicates": "positives"}, "diagonal_weight", 0.2),
    ],
)  # fmt: skip
def test_the_calibration_counts_duplicates_as_the_targets_do(options, figure, value):
    labels = jnp.repeat(jnp.arange(24), 4)
    near = np.repeat(np.asarray(locked(24)), 4, axis=0) + 0.05 * np.asarray(locked(96, seed=1))
    p = jnp.asarray(oracle.unit_rows(near), jnp.float32)
    d = diagnostics(p, labels, **{"duplicates": "masked"} | options)
    assert float(d[figure]) == pytest.approx(value, rel=1e-4)


def test_an_all_zero_channel_has_the_gradient_zero_of_pytorch():
    u, v, _ = oracle.embeds(0, 12, 5)
    profiles = np.random.default_rng(0).normal(size=(12, 3, 4))
    profiles[2, 1] = 0
    theirs = torch.tensor(profiles, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64)
    torch_reference.cellclip(torch.tensor(u), torch.tensor(v), theirs, scale).backward()
    assert theirs.grad is not None
    with jax.enable_x64(True):
        for form in ("fused", "dense"):
            loss_fn = make_loss(LossConfig(name="cellclip", form=form))
            ours = jax.grad(lambda x, f=loss_fn: f(jnp.asarray(u), jnp.asarray(v), x, 2.0)[0])
            ours = jax.jit(ours)
            np.testing.assert_allclose(
                ours(jnp.asarray(profiles)), theirs.grad.numpy(), rtol=1e-9, atol=1e-14
            )
