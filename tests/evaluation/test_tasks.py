"""Whole tasks with an analytic model: accuracies and recalls are known beforehand."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.evaluation.runner import run_task, run_tasks
from cwcl_jax.evaluation.tasks.alignment import Alignment
from cwcl_jax.evaluation.tasks.base import task_class
from cwcl_jax.evaluation.tasks.probes import FewShot, LinearProbe
from cwcl_jax.evaluation.tasks.retrieval import Retrieval
from cwcl_jax.evaluation.tasks.spoken import Intent, Keywords
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot
from tests.evaluation.analytic import DATA, Analytic, Memory, give_sources

SHAPES = ["circle", "square", "star"]
AXES = dict(zip(SHAPES, np.eye(3), strict=True))


def prompts_of(result):
    return result.extras["prompt_sets"][""]


def table(*rows):
    """Grey value -> embedding."""
    full = np.zeros((256, 3))
    full[: len(rows)] = rows
    return full


# Grey 0, 1, 2 are a circle, a square, a star; 3 looks like a square, then a star, then a circle.
MODEL = table([1, 0, 0], [0, 1, 0], [0, 0, 1], [0.1, 0.9, 0.4])


def run(task, encode, **options):
    return run_task("t", task, encode=encode, data=DATA, batch_size=4, **options)


def test_zero_shot_accuracy_of_the_analytic_model(monkeypatch):
    # Nine right; a circle whose own class comes third, and a star whose own comes second.
    source = Memory(
        [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3],
        labels=[0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 2],
        class_names=SHAPES,
    )
    give_sources(monkeypatch, x=source)
    result = run(ZeroShot(source="memory:x", top_k=(1, 2, 3)), Analytic(MODEL, AXES))
    assert result.metrics["top1"] == pytest.approx(9 / 11)
    assert result.metrics["top2"] == pytest.approx(10 / 11)
    assert result.metrics["top3"] == 1.0
    assert result.metrics["mean_per_class_recall"] == pytest.approx((3 / 4 + 1 + 3 / 4) / 3)
    assert result.chance["top1"] == pytest.approx(1 / 3)
    low, high = result.intervals["top1"]
    assert low < 9 / 11 < high
    worst = result.extras["per_class"][0]
    assert (worst["class"], worst["mistaken for"], worst["times"]) == ("circle", "square", 1)


def test_first_templates_make_other_class_embeddings(monkeypatch):
    """One word of the tenth template pulls every class to the square: only k = 1 is right."""
    give_sources(monkeypatch, x=Memory([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES))
    words = {**AXES, "see": np.array([0.0, 99.0, 0.0])}
    task = ZeroShot(source="memory:x", template_counts=(1, 5, 10))
    result = run(task, Analytic(MODEL, words))
    assert result.metrics["top1_k1"] == result.metrics["top1_k5"] == 1.0
    assert result.metrics["top1_k10"] == result.metrics["top1"]
    assert result.extras["prompt_sets"]["_k5"] == ("simple, k=5", 15)


def test_every_batch_has_one_shape_and_padding_is_dropped(monkeypatch):
    give_sources(monkeypatch, x=Memory([0, 1, 2] * 3, labels=[0, 1, 2] * 3, class_names=SHAPES))
    encode = Analytic(MODEL, AXES)
    result = run(ZeroShot(source="memory:x"), encode)
    assert {shape for shape in encode.shapes if shape[0] == "image"} == {("image", (4, 16, 16, 3))}
    assert len([shape for shape in encode.shapes if shape[0] == "text"]) == 1
    assert len(result.items["ids"]) == 9
    assert result.metrics["top1"] == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_batch_size_does_not_change_the_numbers(monkeypatch, batch_size):
    source = Memory([0, 1, 2, 3, 3], labels=[0, 1, 2, 0, 2], class_names=SHAPES)
    give_sources(monkeypatch, x=source)
    result = run_task(
        "t",
        ZeroShot(source="memory:x"),
        encode=Analytic(MODEL, AXES),
        data=DATA,
        batch_size=batch_size,
    )
    assert result.items["rank"].tolist() == [1, 1, 1, 3, 2]


def test_subset_leaves_out_items_and_candidates_and_says_so(monkeypatch, tmp_path):
    (tmp_path / "subset.txt").write_text("circle\nstar\n")
    source = Memory([0, 1, 2, 3], labels=[0, 1, 2, 2], class_names=SHAPES)
    give_sources(monkeypatch, x=source)
    task = ZeroShot(source="memory:x", class_subset=str(tmp_path / "subset.txt"))
    result = run(task, Analytic(MODEL, AXES))
    assert result.items["ids"].tolist() == ["item-0", "item-2", "item-3"]
    assert result.metrics["top1"] == 1.0  # grey 3 is no square any more
    assert result.chance["top1"] == 0.5
    assert "1 of 4 items belong to classes that are not candidates" in result.warnings[0]


def test_duplicate_class_names_are_warned_of_and_tie_to_the_lower_index(monkeypatch):
    names = ["circle", "square", "circle"]
    give_sources(monkeypatch, x=Memory([0, 1, 0], labels=[0, 1, 2], class_names=names))
    result = run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))
    assert result.items["rank"].tolist() == [1, 1, 2]
    assert "stand for more than one class" in result.warnings[0]


def test_border_is_cut_off_before_resizing(monkeypatch):
    class Framed(Memory):
        def read(self, index, fields):
            example = super().read(index, fields)
            if "image" in example:
                example["image"].paste((255, 0, 0), (0, 0, 16, 2))
                example["image"].paste((255, 0, 0), (0, 0, 2, 16))
            return example

    give_sources(monkeypatch, x=Framed([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES))
    assert run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES)).metrics["top1"] < 1
    cut = ZeroShot(source="memory:x", crop_border=2)
    assert run(cut, Analytic(MODEL, AXES)).metrics["top1"] == 1.0


def test_retrieval_recalls_of_the_analytic_model(monkeypatch):
    source = Memory(
        [0, 1, 2, 3],
        texts=[["a circle", "circle circle"], ["a square"], ["a star"], ["a circle and a star"]],
    )
    give_sources(monkeypatch, x=source)
    task = Retrieval(source="memory:x", recall_k=(1, 2, 3))
    result = run(task, Analytic(MODEL, AXES))
    # Picture 3 (0.1, 0.9, 0.4): square 0.91, star 0.40, circle-and-star 0.36, circle 0.10.
    assert result.items["image_to_text_rank"].tolist() == [1, 1, 1, 3]
    assert result.metrics["image_to_text_R@1"] == 0.75
    assert result.metrics["image_to_text_R@3"] == 1.0
    # "a circle and a star": pictures 0 and 2 score 0.71, picture 3 scores 0.36.
    assert result.items["text_to_image_rank"].tolist() == [1, 1, 1, 1, 3]
    assert result.metrics["text_to_image_R@1"] == 0.8
    assert result.metrics["text_to_image_median_rank"] == 1.0
    assert result.chance["image_to_text_R@1"] == pytest.approx((2 + 1 + 1 + 1) / 4 / 5)


def test_alignment_of_the_analytic_model(monkeypatch):
    source = Memory([0, 1, 2] * 4, labels=[0, 1, 2] * 4, texts=SHAPES * 4, class_names=SHAPES)
    give_sources(monkeypatch, x=source)
    task = Alignment(source="memory:x", classes=3, items_per_class=3)
    result = run(task, Analytic(MODEL, AXES))
    assert result.metrics["block_diagonality"] == pytest.approx(1.0)
    assert result.metrics["modality_gap"] == pytest.approx(0.0, abs=1e-6)
    assert result.items["matrix"].shape == (9, 9)
    assert result.items["matrix_classes"].tolist() == ["circle"] * 3 + ["square"] * 3 + ["star"] * 3
    np.testing.assert_allclose(result.items["matrix"], np.kron(np.eye(3), np.ones((3, 3))))


@pytest.mark.parametrize("side", ["image", "text"])
def test_alignment_tells_what_the_projection_of_the_weights_side_keeps(monkeypatch, side):
    """The projection parts the first two classes and brings the last two together."""
    source = Memory([0, 1, 2, 0, 1, 2], labels=[0, 1, 2, 0, 1, 2], texts=SHAPES * 2)
    source.class_names = SHAPES
    give_sources(monkeypatch, x=source)
    before = np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.6, 0.8]])
    after = np.array([[1, 0, 0], [0, 1, 0], [0, 0.6, 0.8]])
    features, embeds = (
        Analytic(table(*x), dict(zip(SHAPES, x, strict=True))) for x in (before, after)
    )
    task = Alignment(source="memory:x", classes=3, items_per_class=2)
    found = run(task, embeds, features=features, weights_from=side).metrics
    # Of a sentence that two items have it counts once.
    rows = [0, 1, 2, 0, 1, 2] if side == "image" else [0, 1, 2]
    cosines = [np.round(x[rows] @ x[rows].T, 6) for x in (before, after)]
    pairs = np.triu_indices(len(rows), 1)
    expected = stats.spearmanr(*(c[pairs] for c in cosines)).statistic
    assert found["structure_kept_by_projection"] == pytest.approx(expected)
    assert "structure_kept_by_projection" not in run(task, embeds, features=features).metrics


def test_sentences_go_to_the_tower_that_the_task_names(monkeypatch):
    numbers = [0, 1, 2] * 3
    texts = [SHAPES[n] for n in numbers]
    give_sources(monkeypatch, x=Memory(numbers, labels=numbers, texts=texts, class_names=SHAPES))
    encode = Analytic(MODEL, AXES)
    options = {"source": "memory:x", "text_tower": "caption"}
    assert run(ZeroShot(**options), encode).metrics["top1"] == 1.0
    assert "image_to_caption_R@1" in run(Retrieval(**options, recall_k=(1,)), encode).metrics
    alignment = run(Alignment(**options, classes=3, items_per_class=3), encode)
    assert "uniformity_caption" in alignment.metrics
    assert {tower for tower, *_ in encode.shapes} == {"image", "caption"}


def test_probe_learns_classes_that_have_no_words(monkeypatch):
    """Both classes look alike to the text side; labelled examples tell them apart."""
    model = table([1, 0, 0], [0.9, 0.1, 0], [0.95, 0, 0.3], [0.85, 0.1, 0.3])
    give_sources(
        monkeypatch,
        train=Memory([0, 1, 2, 3] * 6, labels=[0, 0, 1, 1] * 6, class_names=["ring", "moon"]),
        test=Memory([3, 2, 1, 0, 0], labels=[1, 1, 0, 0, 0], class_names=["ring", "moon"]),
    )
    encode = Analytic(model, {})
    task = LinearProbe(source="memory:test", train_source="memory:train")
    result = run(task, encode)
    assert result.metrics["top1"] == 1.0
    assert result.chance["top1"] == 0.5
    known = "5 of 5 test items have the same image input as an item that the classifier was fitted"
    assert any(known in warning for warning in result.warnings)
    few = FewShot(source="memory:test", train_source="memory:train", shots=(1, 4), repeats=3)
    result = run(few, encode)
    assert result.metrics["top1_shots4"] == 1.0
    assert result.chance["top1_shots1"] == 0.5
    assert result.items["hit_top1_shots1"].shape == (5,)
    features = LinearProbe(
        source="memory:test",
        train_source="memory:train",
        features="features",
    )
    with pytest.raises(ValueError, match="before its projection head"):
        run(features, encode)
    assert run(features, encode, features=encode).metrics["top1"] == 1.0


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (ZeroShot(), "source is empty"),
        (ZeroShot(source="memory:bare"), "no class names"),
        (ZeroShot(source="memory:bare", class_names="a,b"), "has no label"),
        (ZeroShot(source="memory:x", templates="dataset"), "needs template_source"),
        (ZeroShot(source="memory:x", template_counts=(11,)), "k=11"),
        (Retrieval(source="memory:x"), "have no caption"),
        (Alignment(source="memory:x"), "have no text"),
        (LinearProbe(source="memory:x"), "needs train_source"),
        (Intent(source="memory:x"), "set template_source"),
    ],
)
def test_bad_tasks_are_named_with_the_remedy(monkeypatch, task, message):
    give_sources(
        monkeypatch,
        x=Memory([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES),
        bare=Memory([0, 1]),
    )
    with pytest.raises(ValueError, match=message) as error:
        run(task, Analytic(MODEL, AXES))
    assert "evaluation task 't'" in str(error.value)


def test_unusable_items_are_left_out_and_counted(monkeypatch):
    from cwcl_jax.data.skipping import BadExample

    class Broken(Memory):
        def read(self, index, fields):
            if index == 1 and "image" in fields:
                raise BadExample("image unreadable", "cut short")
            return super().read(index, fields)

    give_sources(monkeypatch, x=Broken([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES))
    result = run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))
    assert result.items["ids"].tolist() == ["item-0", "item-2"]
    assert "1 of 3 examples were unusable" in result.warnings[0]
    assert "image unreadable: 1" in result.warnings[0]


def test_tasks_run_in_order_and_log_under_their_names(monkeypatch):
    give_sources(monkeypatch, x=Memory([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES))
    config = EvaluationConfig(
        batch_size=4,
        tasks={
            "b": ZeroShot(source="memory:x"),
            "a": ZeroShot(source="memory:x", max_items=2),
        },
    )
    results = run_tasks(config, encode=Analytic(MODEL, AXES), data=DATA)
    assert [result.name for result in results] == ["b", "a"]
    assert len(results[1].items["ids"]) == 2
    assert results[0].flat()["b/top1"] == 1.0
    assert results[0].seconds["encode"] > 0


def test_the_usual_tower_follows_the_kind():
    assert ZeroShot().tower == Retrieval().tower == "image"
    assert Intent().tower == Keywords().tower == "speech"
    assert Alignment(tower="speech").tower == "speech"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "zeroshot"}, "kind='zeroshot' is not known; did you mean 'zero_shot'"),
        ({"top_k": (0,)}, "at least 1"),
        ({"confidence": 95.0}, "between 0 and 1"),
        ({"unmapped_classes": "skip"}, "unmapped_classes"),
        ({"crop_border": -2}, "crop_border=-2: must be at least 0"),
        ({"max_items": -5}, "max_items=-5: must be at least 0"),
        ({"bootstrap": -1}, "bootstrap=-1: must be at least 0"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"kind": "few_shot", "repeats": 0}, "repeats=0: must be at least 1"),
        ({"kind": "alignment", "classes": 0}, "classes=0: must be at least 2"),
        ({"kind": "few_shot", "shots": ()}, "shots is empty"),
        ({"kind": "linear_probe", "features": "logits"}, "features='logits' is not known"),
        ({"kind": "retrieval", "partner": "image"}, "partner='image' is the tower itself"),
    ],
)
def test_options_are_checked_when_made(fields, message):
    with pytest.raises(ValueError, match=message):
        task_class(fields.get("kind", "zero_shot"))(**fields)
    with pytest.raises(ValueError, match="kind='retrieval' is not a ZeroShot"):
        ZeroShot(kind="retrieval")
    with pytest.raises(ValueError, match="batch_size"):
        EvaluationConfig(batch_size=0)
    with pytest.raises(ValueError, match="'imagenet/val' cannot name a task"):
        EvaluationConfig(tasks={"imagenet/val": ZeroShot()})
    assert ZeroShot(top_k=(5,)).top_k == (1, 5)


def test_broken_files_of_a_task_are_named(monkeypatch, tmp_path):
    give_sources(monkeypatch, x=Memory([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES))
    (tmp_path / "names.json").write_text('["circle", ')
    task = ZeroShot(source="memory:x", class_names=str(tmp_path / "names.json"))
    with pytest.raises(ValueError, match=r"evaluation task 't': .*names\.json is not JSON"):
        run(task, Analytic(MODEL, AXES))


def png(size, grey=0):
    file = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(file, "png")
    return file.getvalue()


def test_pictures_without_a_border_to_cut_are_left_out_and_counted(monkeypatch, tmp_path):
    """Files that are no picture, cut short, too large or too small for the border."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "jpeg")
    encoded = [png((20, 20)), png((20, 20), 1), b"no picture", file.getvalue()[:900], png((3, 3))]
    encoded += [png((101, 100)), b""]

    class Encoded(Memory):
        def read(self, index, fields):
            picture = {"image": encoded[index]} if "image" in fields else {}
            return super().read(index, set(fields) - {"image"}) | picture

    labels = [0, 1, 0, 0, 0, 0, 0]
    give_sources(monkeypatch, x=Encoded(labels, labels=labels, class_names=SHAPES))
    small = dataclasses.replace(DATA.inputs["image"], max_pixels=10_000)
    data = dataclasses.replace(DATA, inputs={**DATA.inputs, "image": small})
    task = ZeroShot(source="memory:x", crop_border=2)
    encode = Analytic(MODEL, AXES)
    result = run_task("t", task, encode=encode, data=data, batch_size=4)
    assert result.items["ids"].tolist() == ["item-0", "item-1"]
    assert result.metrics["top1"] == 1.0
    (warning,) = result.warnings
    assert "5 of 7 examples were unusable" in warning
    for kind in ("image unreadable: 2", "image too small: 1", "image too large: 1", "empty: 1"):
        assert kind in warning


def test_captions_of_several_items_limit_what_a_perfect_model_reaches(monkeypatch):
    """Every item is its caption: what is wrong then is what equal captions make wrong."""
    texts = ["circle", "square", "circle", "star", "circle", "square"]
    give_sources(monkeypatch, x=Memory(range(6), texts=texts))
    task = Retrieval(source="memory:x", recall_k=(1, 2, 3))
    result = run(task, Analytic(table(*(AXES[text] for text in texts)), AXES))
    assert result.metrics["text_to_image_R@1"] == 0.5
    assert result.extras["reachable"] == {
        key: value for key, value in result.metrics.items() if "_R@" in key
    }
    assert "3 of 6 captions repeat an earlier one" in result.warnings[0]
    assert "R@1 50.0 % image to text, 50.0 % text to image" in result.warnings[0]
    give_sources(monkeypatch, x=Memory([0, 1], texts=[["circle", "circle"], "square"]))
    result = run(task, Analytic(MODEL, AXES))
    assert result.extras["reachable"] == {}
    assert not result.warnings


def test_too_many_bad_examples_name_the_task(monkeypatch):
    from cwcl_jax.data.skipping import BadExample, TooManyBadExamples

    class Broken(Memory):
        def read(self, index, fields):
            raise BadExample("image unreadable")

    give_sources(monkeypatch, x=Broken([0] * 30, labels=[0] * 30, class_names=SHAPES))
    with pytest.raises(TooManyBadExamples, match="evaluation task 't': 11 of the 11"):
        run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))


NUMBERS = ["one", "two", "three"]


def test_a_picture_with_one_row_for_each_caption_is_one_item(monkeypatch):
    """OpenCLIP's table of COCO: a perfect encoder finds everything."""
    texts = [f"{number} {word}" for number in NUMBERS for word in SHAPES]
    give_sources(monkeypatch, x=Memory([0, 0, 0, 1, 1, 1, 2, 2, 2], texts=texts))
    perfect = Analytic(MODEL, dict(zip(NUMBERS, np.eye(3), strict=True)))
    result = run(Retrieval(source="memory:x"), perfect)
    assert result.metrics["image_to_text_R@1"] == result.metrics["text_to_image_R@1"] == 1.0
    assert result.items["ids"].tolist() == ["item-0", "item-3", "item-6"]
    assert result.items["owner"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert result.chance["text_to_image_R@1"] == pytest.approx(1 / 3)
    assert result.extras["reachable"] == {}
    assert any("there are 3 image items" in warning for warning in result.warnings)


class Described(Memory):
    """Pictures with several recordings each: a recording's level is the number of its picture."""

    def read(self, index, fields):
        example = super().read(index, fields)
        if "audio" in fields:
            samples = np.full(800 + index, self.values[index], np.int16)
            example["audio"] = (samples, 16_000)
        return example


def test_several_recordings_of_one_picture_are_all_right(monkeypatch):
    give_sources(monkeypatch, x=Described([0, 0, 1, 1, 1, 2]))
    task = Retrieval(source="memory:x", tower="speech", partner="image")
    result = run(task, Analytic(MODEL, AXES))
    assert result.metrics["speech_to_image_R@1"] == result.metrics["image_to_speech_R@1"] == 1.0
    assert len(result.items["ids"]) == 6
    assert len(result.items["owner"]) == 3
    assert result.chance["image_to_speech_R@1"] == pytest.approx((2 + 3 + 1) / 6 / 3)


def test_items_that_stand_twice_in_a_classification_are_counted_aloud(monkeypatch):
    source = Memory([0, 1, 2, 2], labels=[0, 1, 2, 2], class_names=SHAPES)
    give_sources(monkeypatch, x=source)
    result = run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))
    assert any("1 of 4 items of memory:x repeat" in warning for warning in result.warnings)


def test_captions_that_are_cut_are_counted_and_those_that_become_equal(monkeypatch):
    long = "a photo of a circle and a square and a star " * 3
    give_sources(monkeypatch, x=Memory([0, 1, 2], texts=[long + "one", long + "two", "three"]))
    result = run(Retrieval(source="memory:x"), Analytic(MODEL, AXES))
    said = " ".join(result.warnings)
    assert "2 of 3 text sentences are cut at max_tokens=24" in said
    assert "1 of them have the same tokens as an earlier one" in said


def test_recordings_that_are_cut_are_counted(monkeypatch):
    source = Memory([0, 1], modality="speech", samples=[800, 8000], texts=["circle", "square"])
    give_sources(monkeypatch, x=source)
    task = Retrieval(source="memory:x", tower="speech", partner="text")
    result = run(task, Analytic(MODEL, AXES))
    assert any(
        "1 speech item(s) are longer than max_seconds=0.1, and cut" in warning
        for warning in result.warnings
    )


def test_a_sources_own_templates_are_the_usual_ones(monkeypatch):
    """A CLIP_benchmark folder brings them; a task that names others gets these."""
    source = Memory([0, 1, 2], labels=[0, 1, 2], class_names=SHAPES)
    source.templates = ["{c}", "a view of {c}"]
    give_sources(monkeypatch, x=source)
    own = run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))
    assert prompts_of(own) == ("source", 6)
    assert (
        prompts_of(run(ZeroShot(source="memory:x", templates="simple"), Analytic(MODEL, AXES)))[0]
        == "simple"
    )
    source.templates = ()
    with pytest.raises(ValueError, match="has no templates"):
        run(ZeroShot(source="memory:x", templates="source"), Analytic(MODEL, AXES))


def test_class_names_of_another_language_than_the_templates_are_warned_of(monkeypatch):
    source = Memory([0, 1], labels=[0, 1], class_names=["круг", "квадрат"])
    give_sources(monkeypatch, x=source)
    result = run(ZeroShot(source="memory:x"), Analytic(MODEL, AXES))
    assert any("templates are English" in warning for warning in result.warnings)


def test_some_items_of_sorted_data_are_of_all_classes(monkeypatch):
    labels = np.repeat([0, 1, 2], 10).tolist()
    give_sources(monkeypatch, x=Memory(labels, labels=labels, class_names=SHAPES))
    drawn = [
        run(ZeroShot(source="memory:x", max_items=6, seed=seed), Analytic(MODEL, AXES))
        for seed in (0, 0, 1)
    ]
    assert np.bincount(drawn[0].items["labels"]).tolist() == [2, 2, 2]
    ids = [result.items["ids"].tolist() for result in drawn]
    assert ids[0] == ids[1] != ids[2]
    assert any("6 of 30 examples of memory:x, drawn evenly" in w for w in drawn[0].warnings)
