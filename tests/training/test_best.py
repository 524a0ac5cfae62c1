"""Which step is the best and when a run ends follow from the values alone, wherever it resumes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.training.best import TRAINING, VALIDATION, Best, kind_of
from cwcl_jax.training.options import CheckpointConfig
from tests.training.toy import toy_config

LOSS = "validation/loss"


def watching(best=f"{LOSS}:min", patience=0, saved=None):
    return Best(CheckpointConfig(best=best, patience=patience), saved)


@pytest.mark.parametrize("direction", ["min", "max"])
def test_a_run_resumed_anywhere_decides_as_an_undisturbed_one(direction):
    values = np.random.default_rng(0).normal(size=30).tolist()
    values[4] = math.nan
    best = watching(f"{LOSS}:{direction}")
    states = [best.state()]
    for step, value in enumerate(values, 1):
        best.observe(step, {LOSS: value}, VALIDATION)
        states.append(best.state())
    expected = getattr(np, f"nanarg{direction}")(values) + 1
    assert best.step == expected
    for cut in range(len(values)):
        resumed = watching(f"{LOSS}:{direction}", saved=json.loads(json.dumps(states[cut])))
        for step in range(cut + 1, len(values) + 1):
            resumed.observe(step, {LOSS: values[step - 1]}, VALIDATION)
        assert resumed.state() == states[-1]


def test_patience_counts_values_that_are_no_better():
    best = watching(patience=2)
    ends = []
    for step, value in enumerate([3.0, 2.0, 2.0, 1.0, 1.5, math.nan], 1):
        best.observe(step, {LOSS: value}, VALIDATION)
        best.observe(step, {LOSS: value}, VALIDATION)  # a step that was seen counts once
        best.observe(step, {"loss": 0.0}, TRAINING)  # of no concern
        ends.append(best.exhausted)
    assert ends == [False, False, False, False, False, True]
    assert (best.step, best.value) == (4, 1.0)
    # The same values with more patience go on, and another number begins anew.
    assert not watching(patience=3, saved=best.state()).exhausted
    assert watching("loss:min", patience=2, saved=best.state()).step is None


def test_a_number_that_nothing_measures_is_named_with_those_there_are():
    best = watching("validation/los:min")
    with pytest.raises(ConfigError, match=r"validation/los:min: no such metric.*validation/loss"):
        best.observe(1, {LOSS: 1.0}, VALIDATION)


def test_numbers_belong_to_a_measure_by_their_name():
    names = ["loss", "gradient_norm/text", LOSS, "validation_ema/loss", "evaluation/shape/top1"]
    kinds = ["training", "training", "validation", "validation", "evaluation"]
    assert [kind_of(name) for name in names] == kinds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint.best": "validation/loss"}, r"is not NUMBER:min or NUMBER:max"),
        ({"checkpoint.patience": 3}, r"patience=3 needs best"),
        ({"checkpoint.best": "validation/loss:min"}, r"needs config\.data\.validation"),
        (
            {"checkpoint.best": "validation_ema/loss:min", "data.validation_share": 0.1},
            r"needs config\.optimizer\.ema_decay",
        ),
        ({"checkpoint.best": "evaluation/colour/top1:max"}, r"needs one of the tasks \['shape'\]"),
        ({"checkpoint.best": "evaluation/shape/top1:max"}, r"needs config\.evaluation\.every_s"),
        ({"checkpoint.best": "evaluation/x:min", "evaluation.tasks": {}}, "tasks: there is none"),
        ({"data.validation_share": 0.1, "data.validation": "scenes:test"}, "cannot be combined"),
        ({"data.validation_share": 1.0}, r"must be in \[0, 1\)"),
        ({"optimizer.ema_decay": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_what_can_never_be_measured_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy_config(**changes)
