"""The tasks of a run are checked when it starts."""

import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.training.evaluator import Evaluator
from tests.training.toy import toy_config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "folder:/nowhere", "source='folder:/nowhere'"),
        ("class_names", "/nowhere/names.txt", "is not a file"),
        ("templates", "templats.txt", "is neither a named list"),
        ("tower", "speech", "the model has no 'speech' tower"),
        ("in_distribution", "imagenet", "in_distribution='imagenet' is not a classification task"),
    ],
)
def test_wrong_tasks_are_found_at_the_start(tmp_path, field, value, message):
    config = toy_config(**{f"evaluation.tasks.shape.{field}": value})
    with pytest.raises(ConfigError, match=rf"^config\.evaluation\.tasks\.shape: .*{message}"):
        Evaluator(config, tmp_path).check_sources()


def test_wrong_baselines_are_found_at_the_start(tmp_path):
    config = toy_config(**{"evaluation.robustness_baselines": "absent.csv"})
    with pytest.raises(ConfigError, match=r"config\.evaluation\.robustness_baselines: .*absent"):
        Evaluator(config, tmp_path).check_sources()
    Evaluator(toy_config(), tmp_path).check_sources()
