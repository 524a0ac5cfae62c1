"""Ridge classifiers on frozen features."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge as SklearnRidge

from cwcl_jax.evaluation.probe import PENALTIES, few_shot_subset, fit_ridge, score_ranks


def data(n, width, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    centres = rng.normal(size=(classes, width))
    return centres[labels] + rng.normal(size=(n, width)), labels


@pytest.mark.parametrize(("n", "width"), [(60, 8), (20, 50)], ids=["tall", "wide"])
def test_scores_are_those_of_scikit_learn_at_the_same_penalty(n, width):
    x, labels = data(n, width)
    ridge = fit_ridge(x, labels, 4)
    centred = x - x.mean(axis=0)
    alpha = ridge.penalty * np.sum(centred**2) / width
    if n < width:  # the scale is taken over the features, zero eigenvalues included
        alpha = ridge.penalty * np.sum(np.linalg.svd(centred)[1] ** 2) / width
    expected = SklearnRidge(alpha=alpha).fit(x, np.eye(4)[labels]).predict(x)
    np.testing.assert_allclose(ridge.scores(x), expected, atol=1e-8)


@pytest.mark.parametrize(("n", "width"), [(40, 6), (12, 30)], ids=["tall", "wide"])
def test_penalty_has_the_smallest_leave_one_out_error(n, width):
    x, labels = data(n, width, seed=1)
    targets = np.eye(4)[labels]
    scale = np.sum((x - x.mean(axis=0)) ** 2) / width

    def left_out_error(penalty):
        errors = []
        for i in range(n):
            rest = np.arange(n) != i
            # The rest has its own mean, as an intercept that is left out with its row has.
            model = SklearnRidge(alpha=penalty * scale).fit(x[rest], targets[rest])
            errors.append(np.sum((model.predict(x[i : i + 1])[0] - targets[i]) ** 2))
        return np.mean(errors)

    best = min(PENALTIES, key=left_out_error)
    assert fit_ridge(x, labels, 4).penalty == best


def test_separable_features_are_learnt_from_one_example_each():
    x = np.eye(5)
    ridge = fit_ridge(x, np.arange(5), 5)
    assert score_ranks(ridge.scores(x), np.arange(5)).tolist() == [1] * 5


def test_equal_scores_are_ranked_by_class():
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.9]])
    assert score_ranks(scores, np.array([1, 0])).tolist() == [2, 2]
    assert score_ranks(scores, np.array([0, 1])).tolist() == [1, 3]


def test_few_shot_subset_has_the_shots_of_every_class():
    labels = np.random.default_rng(0).integers(0, 5, 100)
    chosen = few_shot_subset(labels, 3, np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [3] * 5
    with pytest.raises(ValueError, match="shots=50, but a class of train_source has only"):
        few_shot_subset(labels, 50, np.random.default_rng(1))


def test_a_single_example_is_an_error():
    with pytest.raises(ValueError, match="two or more"):
        fit_ridge(np.ones((1, 3)), np.zeros(1, int), 2)
