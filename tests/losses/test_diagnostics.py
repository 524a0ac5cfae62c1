import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.losses import LossConfig, contrastive_loss, cwcl_loss, make_loss
from cwcl_jax.losses.presets import PRESETS
from tests.losses import oracle

KEYS = {
    "loss", "loss_u_to_v", "loss_v_to_u", "target_entropy", "excess", "effective_positives",
    "diagonal_weight", "offdiagonal_weight", "accuracy_u_to_v", "accuracy_v_to_u",
    "inverse_temperature", "masked_share",
}  # fmt: skip


def test_the_figures_are_what_their_names_say():
    exact = oracle.embeds(0, 50, 16)
    u, v, p = (jnp.asarray(x, jnp.float32) for x in exact)
    _, d = cwcl_loss(u, v, weights_from=p, logit_scale=2.0)
    assert set(d) == KEYS
    weights = exact[2] @ exact[2].T / 2 + 0.5
    own = np.eye(50, dtype=bool)
    logits = exact[0] @ exact[1].T
    expected = {
        "target_entropy": oracle.entropy(weights),
        "effective_positives": np.exp(oracle.entropy(weights)),
        "diagonal_weight": (np.diagonal(weights) / weights.sum(axis=1)).mean(),
        "offdiagonal_weight": weights[~own].mean(),
        "accuracy_u_to_v": (logits.argmax(axis=1) == np.arange(50)).mean(),
        "accuracy_v_to_u": (logits.argmax(axis=0) == np.arange(50)).mean(),
        "inverse_temperature": np.exp(2.0),
        "excess": float(d["loss_u_to_v"]) - oracle.entropy(weights),
        "loss": float(d["loss_u_to_v"] + d["loss_v_to_u"]),
        "masked_share": 0.0,
    }
    for name, value in expected.items():
        assert float(d[name]) == pytest.approx(value, rel=1e-5), name


def test_the_excess_is_zero_where_predictions_equal_targets():
    # All embeds equal: predictions are uniform, and so are the paper's targets.
    u = jnp.tile(jnp.asarray([[0.6, 0.8]], jnp.float32), (16, 1))
    _, d = cwcl_loss(u, u, weights_from=u, logit_scale=3.0)
    assert float(d["excess"]) == pytest.approx(0, abs=1e-5)
    assert float(d["effective_positives"]) == pytest.approx(16, rel=1e-5)


def test_a_tie_is_not_an_accurate_prediction():
    u = jnp.tile(jnp.asarray([[0.6, 0.8]], jnp.float32), (16, 1))
    _, d = contrastive_loss(u, u, logit_scale=3.0)
    assert float(d["accuracy_u_to_v"]) == float(d["accuracy_v_to_u"]) == 0


def test_the_entropy_of_a_large_batch_is_estimated_from_a_sample():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 600, 16))
    _, d = cwcl_loss(u, v, weights_from=p, logit_scale=2.0)
    exact = oracle.entropy(np.asarray(p @ p.T / 2 + 0.5, np.float64))
    assert float(d["target_entropy"]) == pytest.approx(exact, rel=1e-3)


def test_they_can_be_left_out():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 8, 4))
    config = LossConfig(diagnostics=False)
    _, d = cwcl_loss(u, v, weights_from=p, logit_scale=2.0, config=config)
    assert set(d) == {"loss", "loss_u_to_v", "loss_v_to_u", "inverse_temperature"}


def test_every_loss_tells_its_effective_positives_excess_and_masked_share():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 24, 8))
    labels = jnp.arange(24) // 2
    for name in PRESETS:
        # Labels that are never negative do for sets too.
        _, d = make_loss(LossConfig(name=name))(u, v, p, 2.0, -3.0, labels=labels, q=v)
        assert {"effective_positives", "masked_share"} <= set(d), name
        assert float(d["effective_positives"]) >= 1 - 1e-6, name
        if name != "regression":  # which has no distribution
            assert float(d["excess"]) > -1e-4, name
    _, d = make_loss(LossConfig(name="gist", duplicates="absolute0.7"))(u, v, p, 2.0)
    limit = np.asarray(p @ p.T, np.float64) > 0.3
    assert float(d["masked_share"]) == pytest.approx((limit.sum() - 24) / (24 * 23), rel=1e-5)


def test_effective_positives_of_a_mixture_are_those_of_its_targets():
    u, v, p = (jnp.asarray(x, jnp.float32) for x in oracle.embeds(0, 40, 8))
    config = LossConfig(weight_function="relu2", mix=(0.4,))
    _, d = make_loss(config)(u, v, p, 2.0)
    weights = np.maximum(np.asarray(p @ p.T, np.float64), 0) ** 2
    targets = 0.4 * np.eye(40) + 0.6 * weights / weights.sum(axis=1, keepdims=True)
    assert float(d["target_entropy"]) == pytest.approx(oracle.entropy(targets), rel=1e-5)
    assert float(d["diagonal_weight"]) == pytest.approx(np.diagonal(targets).mean(), rel=1e-5)
