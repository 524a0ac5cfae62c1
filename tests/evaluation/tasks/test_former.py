"""Tasks as older versions wrote them: every field of every kind in each."""

import json

import pytest

from cwcl_jax.config import ConfigError, from_json, to_json, to_plain
from cwcl_jax.evaluation.tasks.base import KINDS, task_class
from cwcl_jax.evaluation.tasks.spoken import Intent
from tests.training.toy import toy_config

# One task of a run's config.json of before, word for word.
OLD = json.loads("""{
    "bootstrap": 1000, "class_names": "", "class_subset": "", "classes": 6, "confidence": 0.95,
    "crop_border": 0, "features": "embeds", "in_distribution": "", "items_per_class": 20,
    "kind": "zero_shot", "max_items": 0, "modality": "image", "partner": "text",
    "recall_k": [1, 5, 10], "repeats": 5, "seed": 0, "sentences_per_class": 0,
    "shots": [1, 5, 10], "source": "scenes:test?task=shape&n=9", "template_counts": [1, 5, 10],
    "template_source": "", "templates": "", "text_upper_bound": true, "top_k": [1, 5],
    "train_source": "", "unmapped_classes": "error"
}""")


def config_with(task):
    return toy_config(**{"evaluation.tasks": {"old": task}})


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_of_before_opens_as_its_kind(kind):
    fields = OLD | {"kind": kind, "template_counts": [], "source": "s", "modality": "speech"}
    task = config_with(fields).evaluation.tasks["old"]
    assert task == task_class(kind)(source="s", tower="speech")
    assert "modality" not in to_plain(task)


def test_what_a_kind_of_before_had_is_kept():
    task = config_with(OLD).evaluation.tasks["old"]
    assert (task.tower, task.template_counts) == ("image", (1, 5, 10))
    config = config_with(OLD | {"kind": "intent", "modality": "", "template_counts": []})
    assert config.evaluation.tasks["old"] == Intent(source=OLD["source"])
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": [1, 2]}, r"a zero_shot task has no field 'shots', and shots=\[1, 2\] never had"),
        ({"kind": "retrieval"}, r"a retrieval task has no field 'template_counts'"),
        ({"tower": "speech"}, r"modality='image' is the old name of tower='speech'"),
        ({"templats": ""}, r" has no field 'templats'; did you mean 'templates'"),
    ],
)
def test_what_a_kind_does_not_have_is_an_error(fields, message):
    with pytest.raises(ConfigError, match=rf"config\.evaluation\.tasks\.old.*{message}"):
        config_with(OLD | fields)
