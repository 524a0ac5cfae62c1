"""What an evaluation leaves: tables, results.json, pictures, values per item."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from cwcl_jax.evaluation.compare import compare_with, load_items
from cwcl_jax.evaluation.options import TaskConfig
from cwcl_jax.evaluation.plots import plot_matrices, plot_template_robustness
from cwcl_jax.evaluation.report import clip_benchmark_records, terminal_report, write_report
from cwcl_jax.evaluation.tasks import run_task
from tests.evaluation.analytic import DATA, Analytic, Memory, give_sources

SHAPES = ["circle", "square", "star"]
AXES = dict(zip(SHAPES, np.eye(3), strict=True))
GOOD = np.zeros((256, 3))
GOOD[:3] = np.eye(3)
BAD = np.zeros((256, 3))
BAD[:3] = np.roll(np.eye(3), 1, axis=0)

TASKS = {
    "shape": TaskConfig(source="memory:x", template_counts=(1, 5, 10), bootstrap=50),
    "pairs": TaskConfig(kind="retrieval", source="memory:pairs", bootstrap=50),
    "matrix": TaskConfig(kind="alignment", source="memory:x", classes=3, items_per_class=3),
}


def results_of(table):
    encode = Analytic(table, AXES)
    return [
        run_task(name, task, encode=encode, data=DATA, batch_size=8) for name, task in TASKS.items()
    ]


@pytest.fixture
def sources(monkeypatch):
    numbers = [0, 1, 2] * 5
    texts = [SHAPES[n] for n in numbers]
    give_sources(
        monkeypatch,
        x=Memory(numbers, labels=numbers, texts=texts, class_names=SHAPES),
        pairs=Memory([0, 1, 2], texts=[["circle", "a circle"], "square", "star"]),
    )


def test_records_are_those_of_clip_benchmark(sources):
    records = clip_benchmark_records(results_of(GOOD), model="toy", pretrained="step 3")
    shape = next(r for r in records if r["name"] == "shape" and r["prompts"] == "simple, k=5")
    known = {key: shape[key] for key in ("dataset", "model", "pretrained", "task", "language")}
    assert known == {
        "dataset": "memory:x",
        "model": "toy",
        "pretrained": "step 3",
        "task": "zeroshot_classification",
        "language": "en",
    }
    assert shape["metrics"] == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0}
    assert shape["chance"]["acc1"] == pytest.approx(1 / 3)
    assert shape["intervals"]["acc1"] == [1.0, 1.0]
    pairs = next(r for r in records if r["name"] == "pairs")
    assert pairs["task"] == "zeroshot_retrieval"
    # Retrieving texts with pictures is our image_to_text.
    assert pairs["metrics"]["text_retrieval_recall@1"] == 1.0
    assert pairs["metrics"]["image_retrieval_recall@5"] == 1.0
    assert pairs["chance"]["text_retrieval_recall@1"] == pytest.approx((2 + 1 + 1) / 3 / 4)
    assert pairs["chance"]["image_retrieval_recall@1"] == pytest.approx(1 / 3)


def test_table_has_chance_beside_every_accuracy(sources):
    shown = terminal_report(results_of(GOOD))
    header = next(line for line in shown.splitlines() if "top-1 %" in line)
    assert header.split("top-1 %")[1].split()[:2] == ["interval", "chance"]
    row = next(line for line in shown.splitlines() if "simple, k=5 (15)" in line)
    assert row.split()[4:7] == ["100.00", "100.0-100.0", "33.33"]
    assert "block diagonality" in shown


def test_every_form_of_the_results_is_written(sources, tmp_path):
    files = write_report(results_of(GOOD), tmp_path / "new", model="toy")
    names = {path.relative_to(tmp_path / "new").as_posix() for path in files}
    assert names == {
        "results.json",
        "results.md",
        "template_robustness.png",
        "shape_classes.csv",
        "matrix.csv",
        "matrix.png",
        "items/shape.npz",
        "items/pairs.npz",
        "items/matrix.npz",
    }
    for path in files:
        assert path.stat().st_size > 0
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 300
    assert len(json.loads((tmp_path / "new" / "results.json").read_text())) == 6
    page = (tmp_path / "new" / "results.md").read_text()
    assert "shape: classes, worst first" in page
    assert "| circle | 5 | 100.0 % | 100.0 % |" in page


def test_paired_tests_between_two_runs_find_the_better_one(sources, tmp_path):
    write_report(results_of(BAD), tmp_path / "old" / "evaluation", model="old")
    table, files = compare_with(results_of(GOOD), "new", tmp_path / "old", tmp_path / "new")
    rows = {row[0]: row for row in table.rows}
    assert rows["shape/top1"][1:4] == ("0.00", "100.00", "+100.00")
    assert rows["shape/top1"][-1] == "higher"
    assert rows["shape/top5"][-1] == "no difference shown"
    assert "shape/top1_k10" not in rows, "all ten templates are the first row already"
    assert "pairs/text_to_image_R@1" in rows
    names = [path.name for path in files]
    assert names == ["matrix_compared.png", "shape_templates_compared.png"]


def test_runs_on_other_items_are_not_compared(sources, tmp_path, monkeypatch):
    write_report(results_of(BAD), tmp_path / "old", model="old")
    give_sources(
        monkeypatch,
        x=Memory([0, 1, 2] * 4, labels=[0, 1, 2] * 4, texts=SHAPES * 4, class_names=SHAPES),
        pairs=Memory([0, 1, 2], texts=SHAPES),
    )
    with pytest.raises(ValueError, match="on other items"):
        compare_with(results_of(GOOD), "new", tmp_path / "old", tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="evaluate that run first"):
        load_items(tmp_path / "nothing")


def test_plots_leave_the_matplotlib_backend_alone(tmp_path):
    import matplotlib

    def chosen():  # reading it in the usual way would choose one
        return dict.__getitem__(matplotlib.rcParams, "backend")

    before = chosen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_template_robustness({"CL": {1: 0.2}, "CWCL": {1: 0.3, 80: 0.4}}, tmp_path / "t.png")
        plot_matrices({"a": np.eye(4)}, [2, 2], ["x", "y"], tmp_path / "deep" / "m.png")
    assert chosen() == before
    assert (tmp_path / "deep" / "m.png").exists()
