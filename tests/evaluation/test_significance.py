"""Intervals and paired tests."""

import math

import numpy as np
import pytest
from scipy.stats import t

from cwcl_jax.evaluation.significance import (
    bootstrap_interval,
    bootstrap_intervals,
    holm,
    mcnemar,
    paired_test,
    seed_interval,
)
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot


def test_interval_of_right_and_wrong_is_the_binomial_one():
    values = np.r_[np.ones(300), np.zeros(700)]
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    # Percentiles of 4000 resamples are themselves known to about 0.002 here.
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)
    assert (low, high) == bootstrap_interval(values, resamples=4000)


def test_groups_that_agree_widen_the_interval():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 20)
    values = np.repeat(rng.integers(0, 2, 50), 20)
    alone = bootstrap_interval(values)
    together = bootstrap_interval(values, groups=groups)
    assert together[1] - together[0] > 3 * (alone[1] - alone[0])


def test_resampled_means_are_those_of_drawn_items_or_groups():
    """By hand: the same draws, one mean after the other."""
    rng = np.random.default_rng(4)
    values, groups = rng.random(40), rng.integers(0, 9, 40)
    draws = np.random.default_rng(7).integers(0, 9, (200, 9))
    means = []
    for drawn in draws:
        rows = np.concatenate([np.flatnonzero(groups == group) for group in drawn])
        means.append(values[rows].mean())
    found = bootstrap_interval(values, groups=groups, resamples=200, seed=7)
    np.testing.assert_allclose(found, np.percentile(means, [2.5, 97.5]), rtol=1e-12)


def test_constant_values_have_an_interval_of_no_width():
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)
    assert bootstrap_interval(np.full(3, 0.25), groups=np.zeros(3, int)) == (0.25, 0.25)
    with pytest.raises(ValueError, match="no items"):
        bootstrap_interval(np.ones(0))


def test_no_intervals_when_none_are_asked_for():
    assert bootstrap_intervals({"top1": np.ones(3)}, ZeroShot(bootstrap=0)) == {}
    assert bootstrap_intervals({"top1": np.ones(3)}, ZeroShot()) == {"top1": (1.0, 1.0)}


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 9), (9, 3), (5, 5), (120, 180), (0, 6)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    """By counting: all ways in which fair coins fall at least as unevenly."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-9)


def test_clear_gain_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    a = rng.random(500) < 0.5
    gain = paired_test(a, a | (rng.random(500) < 0.1))
    assert gain.test == "McNemar, exact"
    assert gain.p_value < 1e-3
    assert gain.interval[0] > 0
    noise = paired_test(a, rng.permutation(a))
    assert noise.p_value > 0.05
    assert noise.interval[0] < 0 < noise.interval[1]


def test_grouped_items_get_sign_flips_over_groups():
    groups = np.repeat(np.arange(6), 100)
    a, b = np.zeros(600), np.ones(600)
    test = paired_test(a, b, groups=groups)
    assert test.test == "sign flips"
    # Six groups that all agree: 2 of the 64 sign patterns are as extreme.
    assert test.p_value == pytest.approx(2 / 64, abs=0.006)


def test_false_positives_are_as_rare_as_stated():
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(200):
        a, b = rng.random((2, 80)) < 0.5
        found += paired_test(a, b, resamples=50).p_value < 0.05
    assert found <= 16  # 5 % of 200 plus two standard errors; the exact test is conservative


def test_runs_on_other_numbers_of_items_are_an_error():
    with pytest.raises(ValueError, match="3 and 4 items"):
        paired_test(np.ones(3), np.ones(4))


def test_holm_correction_is_monotone_and_that_of_the_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("seeds", [2, 3, 11, 40])
def test_interval_over_seeds_is_that_of_students_t(seeds):
    values = np.random.default_rng(3).normal(0.6, 0.01, seeds)
    mean, interval = seed_interval(values.tolist())
    scale = values.std(ddof=1) / np.sqrt(seeds)
    np.testing.assert_allclose(interval, t.interval(0.95, seeds - 1, mean, scale), rtol=1e-9)
    with pytest.raises(ValueError, match="needs at least 2"):
        seed_interval([0.5])
