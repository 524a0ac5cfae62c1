"""Numbers on the way, and when they are worth a warning."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cwcl_jax.cli import DONE
from cwcl_jax.training import health
from cwcl_jax.training.metrics import read_json_lines
from cwcl_jax.training.run import train
from tests.training.toy import toy_config


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cosine_and_rank_are_those_of_all_pairs_and_of_the_eigenvalues():
    rows = unit(np.random.default_rng(0).normal(size=(12, 5)) + 1.0).astype(np.float32)
    found = health.of_embeds({"text": jnp.asarray(rows)})
    cosines = rows @ rows.T
    mean = (cosines.sum() - np.trace(cosines)) / (12 * 11)
    eigenvalues = np.linalg.eigvalsh(rows.T @ rows)
    rank = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    np.testing.assert_allclose(found["mean_cosine/text"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["effective_rank/text"], rank, rtol=1e-5)


def test_more_pairs_than_an_int32_counts():
    rows = unit(np.random.default_rng(0).normal(size=(70_000, 3)) + 1.0).astype(np.float32)
    found = jax.jit(health.of_embeds)({"text": jnp.asarray(rows)})
    total = rows.sum(axis=0, dtype=np.float64)
    mean = (total @ total - 70_000) / (70_000 * 69_999)
    np.testing.assert_allclose(found["mean_cosine/text"], mean, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "cosine", "rank"),
    [(np.eye(4), 0.0, 4.0), (np.ones((6, 3)), 1.0, 1.0), ([[1, 0], [-1, 0]], -1.0, 1.0)],
)
def test_cosine_and_rank_at_their_ends(rows, cosine, rank):
    found = health.of_embeds({"x": jnp.asarray(unit(np.asarray(rows, np.float32)))})
    np.testing.assert_allclose(found["mean_cosine/x"], cosine, atol=1e-6)
    np.testing.assert_allclose(found["effective_rank/x"], rank, rtol=1e-5)


def test_the_gradient_is_told_by_tower():
    gradients = {
        "towers/image/head/kernel": jnp.array([3.0]),
        "towers/text/head/kernel": jnp.array([1.0, 2.0]),
        "towers/text/encoder/norm": jnp.array([2.0]),
        "logit_scale": jnp.array(7.0),
    }
    found = {name: float(value) for name, value in health.of_gradients(gradients).items()}
    assert found == {"gradient_norm/image": 3.0, "gradient_norm/text": 3.0}


def watch(values, **changes):
    """The steps at which something is told, of values by step."""
    config = toy_config(**{"total_steps": 400, "logging.every_steps": 10, **changes})
    watched = health.Health(config, {"image": False, "text": True})
    steps = range(10, 10 * len(values) + 10, 10)
    return [step for step, v in zip(steps, values, strict=True) if watched.look(step, v)]


CLAMPED, FREE = {"logit_scale_at_clamp": 1.0}, {"logit_scale_at_clamp": 0.0}


def test_a_sign_is_told_once_and_again_when_it_returns():
    """A tenth of 400 steps is 40."""
    assert watch([FREE, *[CLAMPED] * 9]) == [60]
    assert watch([*[CLAMPED] * 6, FREE, *[CLAMPED] * 6]) == [50, 120]
    assert watch([CLAMPED, CLAMPED, CLAMPED, CLAMPED, FREE] * 3) == []
    assert watch([CLAMPED] * 9, **{"optimizer.warmup_steps": 30}) == [80]


def losses(u_to_v, v_to_u, entropy):
    return {"loss_u_to_v": u_to_v, "loss_v_to_u": v_to_u, "target_entropy": entropy}


CHANCE = math.log(16)


@pytest.mark.parametrize(
    ("values", "loss", "told"),
    [
        (losses(CHANCE, CHANCE, 0.0), "contrastive", True),
        (losses(CHANCE - 0.5, CHANCE, 0.0), "contrastive", False),
        # CWCL's first direction is near log N by its targets: the other one tells.
        (losses(CHANCE, CHANCE, CHANCE - 0.01), "cwcl", True),
        (losses(CHANCE - 0.005, 1.0, CHANCE - 0.01), "cwcl", False),
        ({"mean_cosine/text": 0.995, "effective_rank/text": 1.01}, "cwcl", True),
        ({"mean_cosine/text": 0.94, "effective_rank/text": 1.12}, "cwcl", False),
        ({"mean_cosine/text": 0.0, "effective_rank/text": 1.001}, "cwcl", True),
    ],
)
def test_what_is_a_sign(values, loss, told):
    assert bool(watch([values] * 9, **{"loss.name": loss})) is told


LONG = {"total_steps": 24, "evaluation.tasks": {}, "checkpoint.every_steps": 0}


def test_a_run_at_chance_and_at_its_clamp_is_told_with_the_remedies(tmp_path, capsys):
    """Compiles a run: that the step's own numbers reach the warning, and the validation the log."""
    stuck = {"temperature.initial": 0.01, "temperature.maximum": 0.01}
    stuck |= {"optimizer.multipliers": ("logit_scale=0",)}  # or it would turn back from the clamp
    changes = {"data.train": "scenes:train?n=400", "data.validation_share": 0.1}
    changes |= {"data.validation_every_steps": 16, "data.validation_batches": 1}
    assert train(toy_config(**LONG, **stuck, **changes), tmp_path) == DONE
    output = capsys.readouterr()
    assert output.out.count("has been at log N = 2.773") == 1
    assert "--config.optimizer.learning_rate" in output.out
    assert output.out.count("has been at its clamp, 0.01") == 1
    assert "--config.temperature.maximum" in output.out
    assert output.err.count("validation after step") == 2
    records = read_json_lines(tmp_path / "metrics.jsonl")
    validated = [r for r in records if "validation/loss" in r]
    assert [r["step"] for r in validated] == [16, 24]
    assert {"validation/accuracy_u_to_v", "validation/recall_at_1_v_to_u"} <= validated[-1].keys()
    trained = next(r for r in records if "loss" in r)
    assert {"gradient_norm/text", "effective_rank/image", "logit_scale"} <= trained.keys()
    assert trained["tokens_cut"] > 0


def test_a_learning_rate_that_collapses_is_told(tmp_path, capsys):
    """Compiles a run: a tower that a real optimizer drove into one point."""
    changes = {"optimizer.learning_rate": 1.0, "optimizer.schedule": "constant"}
    assert train(toy_config(**LONG, **changes), tmp_path) == DONE
    output = capsys.readouterr().out
    assert "the embeddings of the text tower have collapsed since step" in output
    assert "a lower --config.optimizer.learning_rate" in output
