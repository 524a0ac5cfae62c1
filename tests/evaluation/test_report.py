"""What an evaluation leaves: tables, results.json, pictures, values per item."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cwcl_jax.evaluation import plots
from cwcl_jax.evaluation.compare import _values, compare_with, load_items, pair_up
from cwcl_jax.evaluation.plots import draw_item, plot_matrices, plot_template_robustness
from cwcl_jax.evaluation.report import clip_benchmark_records, terminal_report, write_report
from cwcl_jax.evaluation.runner import run_task
from cwcl_jax.evaluation.tasks.alignment import Alignment
from cwcl_jax.evaluation.tasks.retrieval import Retrieval
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot
from cwcl_jax.modalities import FeatureInputs, ImageInputs, SpeechInputs, TextInputs
from tests.evaluation.analytic import DATA, Analytic, Memory, give_sources

SHAPES = ["circle", "square", "star"]
AXES = dict(zip(SHAPES, np.eye(3), strict=True))
GOOD = np.zeros((256, 3))
GOOD[:3] = np.eye(3)
BAD = np.zeros((256, 3))
BAD[:3] = np.roll(np.eye(3), 1, axis=0)

TASKS = {
    "shape": ZeroShot(source="memory:x", template_counts=(1, 5, 10), bootstrap=50),
    "pairs": Retrieval(source="memory:pairs", bootstrap=50),
    "matrix": Alignment(source="memory:x", classes=3, items_per_class=3),
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


def against(results, other, folder):
    return compare_with(results, "new", load_items(other), "old", folder)


def test_paired_tests_between_two_runs_find_the_better_one(sources, tmp_path):
    write_report(results_of(BAD), tmp_path / "old" / "evaluation", model="old")
    table, files = against(results_of(GOOD), tmp_path / "old", tmp_path / "new")
    rows = {row[0]: row for row in table.rows}
    assert rows["shape/top1"][1:4] == ("0.00", "100.00", "+100.00")
    assert rows["shape/top1"][-1] == "higher"
    assert rows["shape/top5"][-1] == "no difference shown"
    assert "shape/top1_k10" not in rows, "all ten templates are the first row already"
    assert "pairs/text_to_image_R@1" in rows
    names = [path.name for path in files]
    assert names == ["matrix_compared.png", "shape_templates_compared.png"]
    assert len(table.notes) == 1, "the runs differ in nothing but the model"


def test_runs_on_other_items_are_compared_on_those_of_both(sources, tmp_path, monkeypatch):
    """Where ranks depend on which items there are, they are not compared; others are all the same.

    The reference: the same tests where both runs have just the items of both.
    """
    write_report(results_of(BAD), tmp_path / "old", model="old")
    numbers = [0, 1, 2] * 4
    x = Memory(numbers, labels=numbers, texts=[SHAPES[n] for n in numbers], class_names=SHAPES)
    give_sources(monkeypatch, x=x, pairs=Memory([0, 1], texts=SHAPES[:2]))
    table, _ = against(results_of(GOOD), tmp_path / "old", tmp_path / "new")
    assert {row[0].partition("/")[0] for row in table.rows} == {"shape"}
    assert "shape: on the 12 items that both have, of 15 and 12." in table.notes
    (left_out,) = [note for note in table.notes if note.startswith("pairs")]
    assert "not compared, since the two runs used different items (3 and 2)" in left_out
    assert left_out.endswith("and its ranks depend on the whole set.")
    write_report([results_of(BAD)[0]], tmp_path / "both", model="old")
    expected = against([results_of(GOOD)[0]], tmp_path / "both", tmp_path / "new")[0]
    assert table.rows == expected.rows
    with pytest.raises(FileNotFoundError, match="evaluate that run first"):
        load_items(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [("aab", "ab", "and some items share an id."), ("ab", "cd", "and no id is in both.")],
)
def test_why_items_cannot_be_matched_is_said(one, other, said):
    sides = [{"t": {"ids": np.array(list(ids))}} for ids in (one, other)]
    pairs, (note,) = pair_up(*sides)
    assert not pairs
    assert note.endswith(said)


def test_what_differs_beside_the_model_is_said(sources, tmp_path, monkeypatch):
    write_report(results_of(BAD), tmp_path / "old", model="old")
    encode = Analytic(GOOD, AXES)

    def notes(name, **fields):
        task = dataclasses.replace(TASKS[name], **fields)
        result = run_task(name, task, encode=encode, data=DATA, batch_size=8)
        return against([result], tmp_path / "old", tmp_path / "new")[0].notes[1:]

    assert notes("shape") == ()
    plain = notes("shape", templates="name", template_counts=())
    assert plain == ("shape: different prompts in the two runs, simple (30) and name (3).",)
    renamed = notes("shape", class_names="circle,square,moon")
    assert "shape: different class names in the two runs." in renamed
    assert "shape: different prompts in the two runs, simple (30) and simple (30)." in renamed
    give_sources(monkeypatch, pairs=Memory([0, 1, 2], texts=["circle", "square", "star"]))
    assert notes("pairs") == ("pairs: different captions in the two runs.",)
    numbers = [0, 1, 2] * 5
    x = Memory(numbers, labels=numbers[::-1], texts=["star"] * 15, class_names=SHAPES)
    give_sources(monkeypatch, x=x)
    assert notes("shape") == ("shape: different labels in the two runs.",)


def test_values_per_item_are_those_of_the_last_evaluation(sources, tmp_path):
    """Of a run's own results and later ones together; none of a task that was left out since."""
    shape, pairs, _ = results_of(GOOD)
    write_report([shape, pairs], tmp_path, model="toy")
    write_report([dataclasses.replace(pairs, name="more")], tmp_path / "evaluation", model="toy")
    assert set(load_items(tmp_path)) == {"shape", "pairs", "more"}
    write_report([results_of(BAD)[0]], tmp_path / "evaluation", model="toy")
    assert set(load_items(tmp_path)) == {"shape", "pairs"}
    assert not (load_items(tmp_path)["shape"]["rank"] == 1).any()
    write_report([pairs], tmp_path, model="toy")
    assert [path.name for path in (tmp_path / "items").iterdir()] == ["pairs.npz"]
    (tmp_path / "items" / "pairs.npz").write_bytes(b"PK cut short")
    with pytest.raises(ValueError, match=r"pairs\.npz is damaged"):
        load_items(tmp_path)


def test_matrices_of_two_runs_are_of_their_tower(sources, tmp_path, monkeypatch):
    asked = []

    def draw(items, path, *, tower):
        asked.append((path.name, tower))
        return path

    monkeypatch.setattr("cwcl_jax.evaluation.compare.draw_matrices", draw)
    write_report(results_of(BAD), tmp_path / "old", model="old")
    against(results_of(GOOD), tmp_path / "old", tmp_path / "new")
    assert asked == [("matrix_compared.png", "image")]


def test_what_repeated_captions_allow_stands_in_the_record(monkeypatch):
    give_sources(monkeypatch, pairs=Memory([0, 9, 1], texts=["circle", "circle", "star"]))
    encode = Analytic(np.where(np.arange(len(GOOD))[:, None] == 9, GOOD[0], GOOD), AXES)
    result = run_task("pairs", TASKS["pairs"], encode=encode, data=DATA, batch_size=8)
    (record,) = clip_benchmark_records([result], model="toy")
    assert record["reachable"]["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert record["reachable"]["image_retrieval_recall@5"] == 1.0


def test_a_table_that_fails_costs_no_values(sources, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ValueError("no table")

    monkeypatch.setattr("cwcl_jax.evaluation.report.all_tables", fail)
    with pytest.raises(ValueError, match="no table"):
        write_report(results_of(GOOD), tmp_path, model="toy")
    assert len(json.loads((tmp_path / "results.json").read_text())) == 6
    assert len(list((tmp_path / "items").iterdir())) == 3


def test_classes_of_one_item_each_are_no_list(sources, tmp_path):
    shape = results_of(GOOD)[0]
    rows = [{**row, "items": 1} for row in shape.extras["per_class"]]
    single = dataclasses.replace(shape, extras={**shape.extras, "per_class": rows})
    for result, listed in ((shape, True), (single, False)):
        write_report([result], tmp_path, model="toy")
        page = (tmp_path / "results.md").read_text()
        assert ("classes, worst first" in page) == listed


def test_a_picture_names_its_run_and_shows_chance_and_intervals(monkeypatch, tmp_path):
    """What a slide needs, without the table beside it."""
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure) or path)
    plot_template_robustness(
        {"shape": {1: 0.2, 5: 0.4}}, tmp_path / "t.png", chance={"shape": 0.1},
        intervals={"shape": {1: (0.1, 0.3), 5: (0.3, 0.5)}}, title="toy: accuracy",
    )  # fmt: skip
    (axes,) = drawn[0].axes
    assert axes.get_title().startswith("toy: accuracy")
    assert [list(line.get_ydata()) for line in axes.lines][1] == [10, 10]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([heights.min(), heights.max()], [10, 50])


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


def test_a_comparison_is_at_the_k_of_the_tasks():
    ranks = np.array([1, 2, 3, 4])
    items = {"ids": np.arange(4), "rank": ranks, "top_k": np.array([1, 3])}
    assert set(_values(items, items)) == {"top1", "top3"}
    assert set(_values(items, items | {"top_k": np.array([3, 5])})) == {"top3"}
    owner = {"owner": np.arange(4), "owner_of_ids": np.arange(4)}
    pairs = {"ids": np.arange(4), "a_to_b_rank": ranks, **owner}
    assert set(_values(pairs, pairs | {"recall_k": np.array([1, 10])})) == {
        "a_to_b_R@1",
        "a_to_b_R@10",
    }


@pytest.mark.parametrize(
    ("modality", "value", "drawn"),
    [
        (ImageInputs(size=8), Image.new("RGB", (16, 8), "red"), "images"),
        (TextInputs(), ["", "a red star"], "texts"),
        (SpeechInputs(max_seconds=0.1), (np.arange(1600, dtype=np.int16), 16000), "lines"),
        (FeatureInputs(), np.ones((3, 5), np.float32), "lines"),
    ],
)
def test_an_item_of_any_modality_is_drawn(modality, value, drawn):
    panel = Figure().subplots()
    shown = modality.preview(value)
    draw_item(panel, shown)
    assert {name: len(getattr(panel, name)) for name in ("images", "texts", "lines")} == {
        "images": 0, "texts": 0, "lines": 0, drawn: 3 if np.ndim(shown) == 2 else 1
    }  # fmt: skip
    if drawn == "images":
        np.testing.assert_array_equal(panel.images[0].get_array()[4, 4], [255, 0, 0])
    if drawn == "lines":
        np.testing.assert_array_equal(panel.lines[0].get_ydata(), np.atleast_2d(shown)[0])


def test_results_say_what_they_were_computed_from(sources):
    shape = dataclasses.replace(results_of(GOOD)[0], data={"memory:x": "0123abcd"})
    for record in clip_benchmark_records([shape], model="toy"):
        assert record["data"] == {"memory:x": "0123abcd"}


def test_intervals_over_texts_say_so_beside_the_number(sources):
    """Recordings of one sentence are drawn together: 15 items are no 15 draws."""
    shape = results_of(GOOD)[0]
    count = len(shape.items["labels"])
    grouped = dataclasses.replace(shape, items={**shape.items, "groups": np.arange(count) // 5})
    assert f" {count} (3 texts)" in terminal_report([grouped])
    assert "texts)" not in terminal_report([shape])
