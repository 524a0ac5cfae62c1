"""Zero-shot classification from embeddings."""

import numpy as np
import pytest
from sklearn.metrics import precision_score, recall_score, top_k_accuracy_score

from cwcl_jax.evaluation.ranking import NEVER
from cwcl_jax.evaluation.zero_shot import (
    class_embeds,
    classification_chance,
    classification_metrics,
    label_ranks,
    normalise,
    per_class_report,
    predict,
)


def test_class_embedding_is_the_normalised_mean_of_normalised_prompts():
    rng = np.random.default_rng(0)
    prompts = rng.normal(size=(5, 4)) * rng.uniform(0.1, 9, (5, 1))
    made = class_embeds(prompts, [2, 3])
    for rows, row in ((prompts[:2], made[0]), (prompts[2:], made[1])):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        mean = unit.mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5)


def test_wrong_number_of_prompts_is_an_error():
    with pytest.raises(ValueError, match="3 prompt embeddings, but the classes have 4"):
        class_embeds(np.ones((3, 2), np.float32), [2, 2])


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    items = rng.normal(size=(300, 6)).astype(np.float32)
    classes = normalise(rng.normal(size=(12, 6)))
    labels = rng.integers(0, 11, 300)  # class 11 has no item
    scores = normalise(items).astype(np.float64) @ classes.T
    ranks = label_ranks(items, classes, labels)
    metrics = classification_metrics(ranks, labels, class_count=12, top_k=(1, 5))
    names = list(range(12))
    assert metrics["top1"] == top_k_accuracy_score(labels, scores, k=1, labels=names)
    assert metrics["top5"] == top_k_accuracy_score(labels, scores, k=5, labels=names)
    predicted = predict(items, classes)
    np.testing.assert_array_equal(predicted, scores.argmax(axis=1))
    recalls = recall_score(labels, predicted, average=None, labels=names[:11])
    np.testing.assert_allclose(metrics["mean_per_class_recall"], np.mean(recalls))
    report = per_class_report(ranks, labels, predicted, [f"class {c:02d}" for c in names])
    precisions = precision_score(labels, predicted, average=None, labels=names[:11])
    assert [row["recall"] for row in report] == sorted(recalls)
    for row in report:
        c = int(row["class"][-2:])
        assert row["precision"] == pytest.approx(precisions[c])
        assert row["items"] == np.sum(labels == c)


def test_prediction_and_rank_agree_on_equal_classes():
    classes = normalise(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
    items = np.float32([[2.0, 0.1], [0.0, 3.0]])
    assert predict(items, classes).tolist() == [0, 1]
    assert label_ranks(items, classes, np.array([2, 1])).tolist() == [2, 1]
    assert label_ranks(items, classes, np.array([0, 1])).tolist() == [1, 1]


def test_unusable_class_is_no_candidate_and_its_items_are_wrong():
    classes = np.eye(3, dtype=np.float32)
    usable = np.array([0, 2])
    ranks = label_ranks(classes, classes, np.arange(3), usable)
    assert ranks.tolist() == [1, NEVER, 1]
    assert 1 not in predict(classes, classes, usable)
    chance = classification_chance(np.arange(3), usable, (1, 5))
    assert chance["top1"] == pytest.approx(2 / 3 / 2)
    assert chance["top5"] == pytest.approx(2 / 3)


def test_labels_and_classes_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        label_ranks(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[:2], np.arange(3))
    with pytest.raises(ValueError, match="3 items but 2 labels"):
        label_ranks(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.arange(2))
