"""Ranks by tiles against the whole similarity matrix in float64."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from cwcl_jax.evaluation import ranking
from cwcl_jax.evaluation.ranking import NEVER, both_match_ranks, first_match_ranks


def oracle(u, v, u_groups, v_groups):
    """Sorts every row of the float64 similarities, equal ones by index."""
    similar = np.asarray(u, np.float64) @ np.asarray(v, np.float64).T
    ranks = []
    for row, group in zip(similar, u_groups, strict=True):
        order = np.argsort(-row, kind="stable")
        right = np.flatnonzero(v_groups[order] == group)
        ranks.append(right[0] + 1 if len(right) else NEVER)
    return np.array(ranks)


def integers(rng, n, d=6):
    """Small integers: their products are exact in float32, and many of them tie."""
    return rng.integers(-2, 3, (n, d)).astype(np.float32)


@pytest.fixture(params=[(4096, 2048), (7, 5), (16, 64)], ids=str)
def tiles(request, monkeypatch):
    monkeypatch.setattr(ranking, "ROWS", request.param[0])
    monkeypatch.setattr(ranking, "COLUMNS", request.param[1])


@pytest.mark.parametrize("seed", range(3))
def test_ranks_equal_the_brute_force_ones_with_ties_and_shared_groups(tiles, seed):
    rng = np.random.default_rng(seed)
    u, v = integers(rng, 53), integers(rng, 41)
    u_groups, v_groups = rng.integers(0, 12, 53), rng.integers(0, 14, 41)
    forward, backward = both_match_ranks(u, v, u_groups, v_groups)
    np.testing.assert_array_equal(forward, oracle(u, v, u_groups, v_groups))
    np.testing.assert_array_equal(backward, oracle(v, u, v_groups, u_groups))
    np.testing.assert_array_equal(first_match_ranks(u, v, u_groups, v_groups), forward)


def test_ranks_of_unit_vectors_equal_those_in_float64(tiles):
    rng = np.random.default_rng(3)
    u, v = rng.normal(size=(200, 16)), rng.normal(size=(300, 16))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    groups = np.arange(300)
    forward, backward = both_match_ranks(
        u.astype(np.float32), v.astype(np.float32), groups[:200], groups
    )
    np.testing.assert_array_equal(forward, oracle(u, v, groups[:200], groups))
    np.testing.assert_array_equal(backward, oracle(v, u, groups, groups[:200]))


def test_equal_candidates_are_ranked_by_index_wherever_their_tile_is(tiles):
    rng = np.random.default_rng(4)
    v = rng.normal(size=(70, 33)).astype(np.float32)
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    v[[3, 30, 69]] = v[3]
    ranks = first_match_ranks(v, v, np.arange(70), np.arange(70))
    assert ranks[[3, 30, 69]].tolist() == [1, 2, 3]
    assert (np.delete(ranks, [3, 30, 69]) == 1).all()


def test_collapsed_embeddings_score_chance():
    same = np.tile(np.float32([0.6, 0.8]), (10, 1))
    ranks = first_match_ranks(same, same, np.arange(10), np.arange(10))
    assert ranks.tolist() == list(range(1, 11))
    assert np.mean(ranks <= 5) == 0.5


def test_query_without_a_match_is_wrong_at_every_k():
    u = np.eye(3, dtype=np.float32)
    ranks, back = both_match_ranks(u, u[:2], np.array([0, 1, 9]), np.array([0, 1]))
    assert ranks.tolist() == [1, 1, NEVER]
    assert back.tolist() == [1, 1]


def test_group_ids_may_be_any_integers():
    u = np.eye(2, dtype=np.float32)
    ids = np.array([-(2**40), 2**40])
    assert first_match_ranks(u, u[::-1], ids, ids[::-1]).tolist() == [1, 1]


def test_top_k_accuracy_is_that_of_scikit_learn():
    """Without ties: scikit-learn breaks them the other way round."""
    rng = np.random.default_rng(5)
    items, classes = rng.normal(size=(500, 8)), rng.normal(size=(20, 8))
    labels = rng.integers(0, 20, 500)
    ranks = first_match_ranks(
        items.astype(np.float32), classes.astype(np.float32), labels, np.arange(20)
    )
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(labels, items @ classes.T, k=k, labels=range(20))
        assert np.mean(ranks <= k) == expected


def test_one_device_and_four_give_the_same_ranks(monkeypatch):
    import jax

    monkeypatch.setattr(ranking, "ROWS", 8)
    rng = np.random.default_rng(6)
    u, v = integers(rng, 45), integers(rng, 30)
    groups = rng.integers(0, 9, 45)
    assert len(jax.local_devices()) == 4
    four = both_match_ranks(u, v, groups, groups[:30])
    first = jax.local_devices()[:1]
    monkeypatch.setattr(ranking.jax, "local_devices", lambda: first)
    one = both_match_ranks(u, v, groups, groups[:30])
    np.testing.assert_array_equal(four[0], one[0])
    np.testing.assert_array_equal(four[1], one[1])


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_an_error(broken):
    u = np.eye(2, dtype=np.float32)
    v = u.copy()
    v[1, 1] = broken
    with pytest.raises(ValueError, match="candidates hold NaN or infinity"):
        first_match_ranks(u, v, np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="no queries"):
        first_match_ranks(u[:0], u, np.arange(0), np.arange(2))
