"""Retrieval with several captions per item."""

import numpy as np
import pytest

from cwcl_jax.evaluation.retrieval import (
    reachable_ranks,
    recall_chance,
    recall_metrics,
    retrieval_ranks,
)


def brute_force(items, captions, owner):
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (items, captions)]
    similar = unit[0] @ unit[1].T
    to_text = [
        1 + min(np.flatnonzero(owner[np.argsort(-row, kind="stable")] == i))
        for i, row in enumerate(similar)
    ]
    to_item = [
        1 + int(np.flatnonzero(np.argsort(-similar[:, j], kind="stable") == owner[j])[0])
        for j in range(len(captions))
    ]
    return np.array(to_text), np.array(to_item)


def test_ranks_equal_brute_force_with_captions_in_any_order():
    rng = np.random.default_rng(0)
    items, captions = rng.normal(size=(40, 5)), rng.normal(size=(130, 5))
    owner = rng.permutation(np.r_[np.arange(40), rng.integers(0, 40, 90)])
    ours = retrieval_ranks(items.astype(np.float32), captions.astype(np.float32), owner)
    for mine, expected in zip(ours, brute_force(items, captions, owner), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_known_recalls_of_a_rotated_model():
    """Item i is closest to caption i + 1, then to its own: rank 2, except for the last one."""
    n = 10
    angle = np.arange(n) * 0.1
    items = np.stack([np.cos(angle + 0.06), np.sin(angle + 0.06)], 1).astype(np.float32)
    captions = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
    to_text, to_item = retrieval_ranks(items, captions, np.arange(n))
    assert to_text.tolist() == [2] * 9 + [1]
    assert to_item.tolist() == [1] + [2] * 9
    metrics = recall_metrics(to_text, "image_to_text", (1, 5))
    assert metrics == {
        "image_to_text_R@1": 0.1,
        "image_to_text_R@5": 1.0,
        "image_to_text_median_rank": 2.0,
        "image_to_text_mean_rank": 1.9,
    }


def test_any_caption_of_an_item_counts():
    items = np.eye(2, dtype=np.float32)
    captions = np.float32([[0, 1], [1, 0], [0.1, 1]])
    to_text, to_item = retrieval_ranks(items, captions, np.array([0, 0, 1]))
    assert to_text.tolist() == [1, 2]
    assert to_item.tolist() == [2, 1, 1]


def test_item_without_caption_is_an_error():
    with pytest.raises(ValueError, match="1 of 2 items have no caption"):
        retrieval_ranks(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.zeros(2, int))
    with pytest.raises(ValueError, match="2 captions but 3 owners"):
        retrieval_ranks(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), np.arange(3))


def test_chance_is_that_of_random_orders():
    rng = np.random.default_rng(1)
    relevant = np.array([5, 1])
    expected = recall_chance(relevant, 20, "x", (1, 5, 30))
    assert expected["x_R@30"] == 1.0
    draws = np.argsort(rng.random((40_000, 20)), axis=1)
    for k in (1, 5):
        random = np.mean([np.mean((draws[:, :k] < count).any(axis=1)) for count in relevant])
        assert expected[f"x_R@{k}"] == pytest.approx(random, abs=0.01)  # 40,000 draws: SE 0.0025


def test_reachable_ranks_are_those_of_a_brute_force_count():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    texts = [f"caption {number}" for number in rng.integers(0, 30, len(owner))]
    to_caption, to_item = reachable_ranks(texts, owner)
    having = [{texts[j] for j in np.flatnonzero(owner == i)} for i in range(40)]
    for j, (text, own) in enumerate(zip(texts, owner, strict=True)):
        assert to_item[j] == 1 + sum(text in having[i] for i in range(own))
    for i in range(40):
        earlier = [
            sum(texts[k] == texts[j] and owner[k] < i for k in range(j))
            for j in np.flatnonzero(owner == i)
        ]
        assert to_caption[i] == 1 + min(earlier)
