"""Tasks that cannot run are found before anything is encoded."""

import pytest

from cwcl_jax.evaluation.checks import check_in_distribution, check_tasks
from cwcl_jax.evaluation.options import EvaluationConfig, TaskConfig

SHAPE = "scenes:test?task=shape&n=9"


def check(modalities=("image", "text"), **fields):
    task = TaskConfig(**{"source": SHAPE, **fields})
    check_tasks(EvaluationConfig(tasks={"a": task}), modalities=modalities)


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
        ({"modality": "speech"}, "no 'speech' tower for this zero_shot task; it has"),
        ({"kind": "retrieval", "modality": "speech"}, "no 'speech' tower for this retrieval"),
        ({"kind": "retrieval", "partner": "speech"}, "no 'speech' tower for this retrieval"),
        ({"kind": "intent", "modality": "image"}, "set template_source"),
        ({"kind": "linear_probe"}, "train_source is empty"),
        ({"kind": "alignment", "class_names": "a,b"}, "has 2 names"),
    ],
)
def test_what_cannot_run_is_named_with_its_task(fields, message):
    with pytest.raises(ValueError, match=rf"^evaluation\.tasks\.a: .*{message}"):
        check(**fields)


def test_what_can_run_passes():
    check()
    check(kind="retrieval", source="scenes:test?task=retrieval&n=9")
    check(kind="linear_probe", train_source=SHAPE)
    # A probe needs one tower, and retrieval the two that it names.
    check(("image", "speech"), kind="linear_probe", train_source=SHAPE)
    check(("image", "speech"), kind="retrieval", partner="speech")
    with pytest.raises(ValueError, match="no 'text' tower"):
        check(("image", "speech"))


def test_baselines_and_in_distribution_tasks(tmp_path):
    tasks = {"a": TaskConfig(source=SHAPE), "b": TaskConfig(source=SHAPE, in_distribution="a")}
    path = tmp_path / "baselines.csv"

    def check_file():
        config = EvaluationConfig(tasks=tasks, robustness_baselines=str(path))
        check_tasks(config, modalities=("image", "text"))

    with pytest.raises(ValueError, match=r"^evaluation\.robustness_baselines: .* is not a file"):
        check_file()
    path.write_text("task,in_distribution,shifted\nb,0.5,0.3\nother,0.5,0.3\n")
    with pytest.raises(ValueError, match=r"task b: 1 baseline model\(s\): a line needs two"):
        check_file()
    path.write_text("task,in_distribution,shifted\nb,0.5,0.3\nb,0.6,0.3\nother,0.5,0.3\n")
    check_file()
    check_in_distribution(EvaluationConfig(tasks=tasks))
    tasks["a"] = TaskConfig(kind="retrieval", source=SHAPE)
    with pytest.raises(ValueError, match=r"tasks\.b: in_distribution='a' is no classification"):
        check_in_distribution(EvaluationConfig(tasks=tasks))
