"""Numbers and matrices of alignment."""

import csv

import numpy as np
import pytest
from scipy import stats

from cwcl_jax.evaluation.alignment import (
    block_diagonality,
    choose_items,
    kept_by_projection,
    pair_metrics,
    write_matrix,
)


def test_block_diagonality_is_within_minus_between():
    labels = np.array([0, 0, 1])
    matrix = np.array([[0.9, 0.7, 0.1], [0.8, 0.6, 0.2], [0.0, 0.1, 0.5]])
    numbers = block_diagonality(matrix, labels)
    assert numbers["within_class"] == pytest.approx((0.9 + 0.7 + 0.8 + 0.6 + 0.5) / 5)
    assert numbers["between_class"] == pytest.approx((0.1 + 0.2 + 0.0 + 0.1) / 4)
    difference = numbers["within_class"] - numbers["between_class"]
    assert numbers["block_diagonality"] == pytest.approx(difference)
    assert numbers["block_diagonality_other_items"] == pytest.approx((0.7 + 0.8) / 2 - 0.1)


def test_pairs_alone_make_no_block_diagonal_of_other_items():
    numbers = block_diagonality(np.eye(6), np.repeat(np.arange(3), 2))
    assert numbers["block_diagonality"] == 0.5
    assert numbers["block_diagonality_other_items"] == 0.0


def test_one_class_alone_has_no_block_diagonal():
    with pytest.raises(ValueError, match="between classes"):
        block_diagonality(np.ones((2, 2)), np.zeros(2, int))


def test_identical_modalities_have_no_gap_and_the_same_structure():
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    numbers = pair_metrics(x, 3 * x)
    assert numbers["modality_gap"] == pytest.approx(0, abs=1e-6)
    assert numbers["alignment"] == pytest.approx(0, abs=1e-6)
    assert numbers["structure_between_modalities"] == pytest.approx(1)
    assert numbers["uniformity_u"] == pytest.approx(numbers["uniformity_v"])


def test_pair_metrics_equal_their_definitions():
    rng = np.random.default_rng(1)
    u, v = rng.normal(size=(2, 30, 4))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    numbers = pair_metrics(u, v)
    assert numbers["modality_gap"] == pytest.approx(np.linalg.norm(u.mean(0) - v.mean(0)), rel=1e-5)
    assert numbers["alignment"] == pytest.approx(
        np.mean([np.sum((a - b) ** 2) for a, b in zip(u, v, strict=True)]), rel=1e-5
    )
    for name, x in (("uniformity_u", u), ("uniformity_v", v)):
        kernel = [
            np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(30) for j in range(i + 1, 30)
        ]
        assert numbers[name] == pytest.approx(np.log(np.mean(kernel)), rel=1e-5)


def test_what_a_projection_keeps_equals_counting_pair_by_pair():
    rng = np.random.default_rng(4)
    p, u = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    u[:, :3] += 2 * p[:, :3]

    def cosine(x, i, j):
        return x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])

    def nearest(x, i):
        return set(sorted((j for j in range(20) if j != i), key=lambda j: -cosine(x, i, j))[:4])

    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    ranks = [stats.rankdata([cosine(x, i, j) for i, j in pairs]) for x in (p, u)]
    shared = [len(nearest(p, i) & nearest(u, i)) / 4 for i in range(20)]
    found = kept_by_projection(p.astype(np.float32), u.astype(np.float32), neighbours=4)
    expected = np.corrcoef(*ranks)[0, 1]
    assert found["structure_kept_by_projection"] == pytest.approx(expected, abs=1e-6)
    assert found["neighbours_kept_by_projection"] == pytest.approx(np.mean(shared))
    assert 0.2 < expected < 0.9


def test_rotations_keep_the_structure_and_noise_does_not():
    rng = np.random.default_rng(5)
    p = rng.normal(size=(300, 16)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    kept = kept_by_projection(p, 3 * p @ rotation)
    assert kept["structure_kept_by_projection"] == pytest.approx(1, abs=1e-5)
    assert kept["neighbours_kept_by_projection"] > 0.999
    lost = kept_by_projection(p, rng.normal(size=(300, 16)).astype(np.float32))
    assert abs(lost["structure_kept_by_projection"]) < 0.05
    assert lost["neighbours_kept_by_projection"] < 0.1
    assert kept_by_projection(p, np.ones((300, 4), np.float32)) == {}  # all pairs are alike


def test_chosen_items_are_sorted_by_class_equal_in_number_and_repeatable():
    labels = np.random.default_rng(2).integers(0, 9, 300)
    labels[labels == 8] = 7
    labels[0] = 8  # a class with one item takes no part
    chosen = choose_items(labels, classes=6, items_per_class=10, seed=0)
    names, counts = np.unique(labels[chosen], return_counts=True)
    assert counts.tolist() == [10] * 6
    assert 8 not in names
    assert (np.diff(labels[chosen]) >= 0).all()
    assert len(set(chosen.tolist())) == 60
    again = choose_items(labels, classes=6, items_per_class=10, seed=0)
    np.testing.assert_array_equal(chosen, again)
    other = choose_items(labels, classes=6, items_per_class=10, seed=1)
    assert not np.array_equal(chosen, other)


def test_classes_with_enough_items_are_preferred():
    labels = np.repeat(np.arange(5), [3, 20, 4, 20, 20])
    chosen = choose_items(labels, classes=3, items_per_class=20, seed=0)
    assert np.unique(labels[chosen]).tolist() == [1, 3, 4]
    assert len(chosen) == 60


def test_small_class_limits_all_and_too_few_classes_are_an_error():
    labels = np.array([0] * 5 + [1] * 3)
    assert len(choose_items(labels, classes=2, items_per_class=20, seed=0)) == 6
    with pytest.raises(ValueError, match="only 2 classes have two items"):
        choose_items(labels, classes=6, items_per_class=20, seed=0)


def test_matrix_file_names_rows_columns_and_classes(tmp_path):
    path = write_matrix(tmp_path / "m.csv", np.array([[1.0, 0.5], [0.25, 1.0]]), ["a", "b"], "xy")
    rows = list(csv.reader(path.read_text().splitlines()))
    assert rows[0] == ["id", "class", "a", "b"]
    assert rows[2] == ["b", "y", "0.250000", "1.000000"]
