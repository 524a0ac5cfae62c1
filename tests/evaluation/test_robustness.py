"""Effective robustness."""

import numpy as np
import pytest

from cwcl_jax.evaluation.results import TaskResult
from cwcl_jax.evaluation.robustness import (
    fit_line,
    read_baselines,
    robustness_points,
    robustness_table,
)
from cwcl_jax.evaluation.tasks.retrieval import Retrieval
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot


def result(name, top1, inside="", classes=("a", "b")):
    return TaskResult(
        name,
        ZeroShot(source="memory:x"),
        {"top1": top1},
        extras={"class_names": list(classes)},
        in_distribution=inside,
    )


def logit(p):
    return np.log(p / (1 - p))


def test_line_in_logit_space_is_recovered():
    inside = np.array([0.3, 0.5, 0.7, 0.8])
    shifted = 1 / (1 + np.exp(-(0.9 * logit(inside) - 0.7)))
    line = fit_line(list(zip(inside.tolist(), shifted.tolist(), strict=True)))
    assert line.slope == pytest.approx(0.9)
    assert line.intercept == pytest.approx(-0.7)
    assert line.expected(0.6) == pytest.approx(1 / (1 + np.exp(-(0.9 * logit(0.6) - 0.7))))


def test_effective_robustness_is_the_distance_from_the_line_of_the_baselines():
    results = [result("imagenet", 0.6), result("sketch", 0.5, "imagenet")]
    table = robustness_table(results, {"sketch": [(0.5, 0.5), (0.7, 0.7)]})
    assert table is not None
    assert table.rows == (
        ("sketch", "imagenet", "60.00", "50.00", "-10.00", "0.833", "60.00", "-10.00"),
    )
    assert table.notes == ()


def test_without_baselines_no_line_is_assumed():
    table = robustness_table([result("imagenet", 0.6), result("a", 0.2, "imagenet")])
    assert table is not None
    assert table.rows[0][-2:] == ("", "")
    assert "baseline" in table.notes[0]
    assert robustness_table([result("imagenet", 0.6)]) is None


def test_other_classes_are_pointed_out():
    table = robustness_table([result("i", 0.6), result("a", 0.2, "i", ("a",))])
    assert table is not None
    assert "different classes (1 against 2)" in table.notes[0]


def test_in_distribution_task_that_cannot_be_compared_with_is_a_note():
    """Others are compared all the same: the accuracies were measured."""
    pairs = TaskResult("pairs", Retrieval(source="memory:x"), {"image_to_text_R@1": 0.3})
    results = [
        result("a", 0.2, "imagenet"),
        pairs,
        result("b", 0.3, "pairs"),
        result("i", 0.6),
        result("c", 0.5, "i"),
    ]
    assert robustness_points(results) == {"c": (0.6, 0.5)}
    table = robustness_table(results)
    assert table is not None
    assert [row[0] for row in table.rows] == ["c"]
    assert table.notes[:2] == (
        "a: its in-distribution task 'imagenet' did not run.",
        "b: its in-distribution task 'pairs' has no top-1.",
    )
    alone = robustness_table([result("a", 0.2, "imagenet")])
    assert alone is not None
    assert (len(alone.rows), len(alone.notes)) == (0, 1)
    assert "did not run" in alone.text()


def test_baseline_file_is_checked(tmp_path):
    path = tmp_path / "baselines.csv"
    path.write_text("task,in_distribution,shifted\nsketch,0.5,0.3\nsketch,0.7,0.5\n")
    assert read_baselines(path) == {"sketch": [(0.5, 0.3), (0.7, 0.5)]}
    path.write_text("task,in_distribution\nsketch,0.5\n")
    with pytest.raises(ValueError, match="lacks the column"):
        read_baselines(path)
    path.write_text("task,in_distribution,shifted\nsketch,50,30\n")
    with pytest.raises(ValueError, match="fractions"):
        read_baselines(path)
    path.write_text("task,in_distribution,shifted\nsketch,0.5\n")
    with pytest.raises(ValueError, match=r"baselines\.csv, line 2: .* are not numbers"):
        read_baselines(path)
    with pytest.raises(FileNotFoundError, match="robustness_baselines"):
        read_baselines(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match="two with different"):
        fit_line([(0.5, 0.3)])
