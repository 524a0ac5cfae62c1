"""Tasks that cannot run are found before anything is encoded."""

import pytest

from cwcl_jax.evaluation.checks import check_in_distribution, check_tasks
from cwcl_jax.evaluation.options import EvaluationConfig
from cwcl_jax.evaluation.tasks.base import task_class
from cwcl_jax.evaluation.tasks.retrieval import Retrieval
from cwcl_jax.evaluation.tasks.zero_shot import ZeroShot

SHAPE = "scenes:test?task=shape&n=9"


def check(towers=("image", "text"), kind="zero_shot", **fields):
    task = task_class(kind)(**{"source": SHAPE, **fields})
    check_tasks(EvaluationConfig(tasks={"a": task}), towers=towers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"source": "folder:/nowhere"}, "source='folder:/nowhere': .*"),
        ({"class_names": "/nowhere/names.txt"}, "class_names='/nowhere/names.txt' is not a file"),
        ({"class_names": "a,b"}, "has 2 names, but the source has"),
        ({"class_subset": "/nowhere/names.txt"}, "class_subset=.* is not a file"),
        ({"templates": "templats.txt"}, "templates='templats.txt' is neither"),
        ({"template_counts": (1, 11)}, "k=11"),
        ({"templates": "dataset"}, "needs template_source"),
        ({"tower": "speech"}, "no 'speech' tower for this zero_shot task; it has"),
        ({"kind": "retrieval", "tower": "speech"}, "no 'speech' tower for this retrieval"),
        ({"kind": "retrieval", "partner": "speech"}, "no 'speech' tower for .*: set partner to"),
        ({"text_tower": "caption"}, "no 'caption' tower for this zero_shot task; .*set text_tower"),
        ({"kind": "alignment", "text_tower": "caption"}, "no 'caption' tower for this alignment"),
        ({"template_source": "folder:/nowhere"}, "template_source='folder:/nowhere': "),
        ({"kind": "intent", "tower": "image"}, "set template_source"),
        ({"kind": "linear_probe"}, "train_source is empty"),
        ({"kind": "alignment", "class_names": "a,b"}, "has 2 names"),
    ],
)
def test_what_cannot_run_is_named_with_its_task(fields, message):
    with pytest.raises(ValueError, match=rf"^evaluation\.tasks\.a: .*{message}"):
        check(**fields)


def test_every_task_that_cannot_run_is_told():
    tasks = {name: ZeroShot(source=SHAPE, class_names="a,b") for name in ("x", "y")}
    words = r"(?s)^evaluation\.tasks\.x: .*2 names.*\nevaluation\.tasks\.y: .*2 names"
    with pytest.raises(ValueError, match=words):
        check_tasks(
            EvaluationConfig(tasks=tasks | {"z": ZeroShot(source=SHAPE)}), towers=("image", "text")
        )


def test_what_can_run_passes():
    check()
    check(kind="retrieval", source="scenes:test?task=retrieval&n=9")
    check(kind="linear_probe", train_source=SHAPE)
    # A probe needs one tower, and retrieval the two that it names.
    check(("image", "speech"), kind="linear_probe", train_source=SHAPE)
    check(("image", "speech"), kind="retrieval", partner="speech")
    with pytest.raises(ValueError, match="no 'text' tower"):
        check(("image", "speech"))
    # The tower that reads may have any name.
    check(("image", "caption"), text_tower="caption")
    check(("image", "caption"), kind="retrieval", text_tower="caption")


def test_baselines_and_in_distribution_tasks(tmp_path):
    tasks = {"a": ZeroShot(source=SHAPE), "b": ZeroShot(source=SHAPE, in_distribution="a")}
    path = tmp_path / "baselines.csv"

    def check_file():
        config = EvaluationConfig(tasks=tasks, robustness_baselines=str(path))
        check_tasks(config, towers=("image", "text"))

    with pytest.raises(ValueError, match=r"^evaluation\.robustness_baselines: .* is not a file"):
        check_file()
    path.write_text("task,in_distribution,shifted\nb,0.5,0.3\nother,0.5,0.3\n")
    with pytest.raises(ValueError, match=r"task b: 1 baseline model\(s\): a line needs two"):
        check_file()
    path.write_text("task,in_distribution,shifted\nb,0.5,0.3\nb,0.6,0.3\nother,0.5,0.3\n")
    check_file()
    check_in_distribution(EvaluationConfig(tasks=tasks))
    tasks["a"] = Retrieval(source=SHAPE)
    with pytest.raises(ValueError, match=r"tasks\.b: in_distribution='a' is not a classification"):
        check_in_distribution(EvaluationConfig(tasks=tasks))
