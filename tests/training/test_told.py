"""What a run tells a person, and with which exit code it ends: nothing here computes."""

from __future__ import annotations

import json
from unittest import mock

import jax.numpy as jnp
import pytest

from cwcl_jax import cli
from cwcl_jax.config import with_tasks
from cwcl_jax.data.skipping import TooManyBadExamples
from cwcl_jax.modalities import SpeechInputs
from cwcl_jax.models.tower import TowerConfig
from cwcl_jax.training import sharding, telling
from cwcl_jax.training.state import Blueprint, TrainState, make_blueprint
from tests.training.toy import toy_config


def test_too_many_bad_examples_are_one_line_and_exit_code_2(capsys):
    @cli.command(lambda parser: None)
    def command(options):
        raise TooManyBadExamples("20 of 30 examples are unusable")

    assert command([]) == cli.BAD_CONFIG
    assert capsys.readouterr().err == "error: 20 of 30 examples are unusable\n"


def test_the_examples_skipped_in_a_run_are_summed_up(capsys):
    telling.skipped_examples({"text empty": 2, "image unreadable": 1}, "training")
    said = capsys.readouterr().out
    assert said.startswith("3 training examples were unusable and skipped (image unreadable: 1, ")
    telling.skipped_examples({}, "training")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("locked", "warned"), [(True, True), (False, False)])
def test_what_a_locked_encoder_does_not_use_is_warned_of(capsys, locked, warned):
    overrides = {"time_masks": 2, "noise_db": 0.0, "dropout": 0.1, "width": 16}
    towers = {"speech": TowerConfig("conv_speech", "tiny", overrides, tune="head")}
    blueprint = mock.Mock(spec=Blueprint, config=mock.Mock(towers=towers))
    blueprint.features_are_locked.return_value = locked
    telling.of_locked(blueprint)
    assert capsys.readouterr().out == warned * (
        "warning: without effect in config.towers.speech.overrides: dropout=0.1, time_masks=2, "
        "because the encoder is locked (tune='head')\n"
    )


@pytest.mark.parametrize(("tune", "warned"), [("none", True), ("all", False)])
def test_a_locked_tower_without_weights_is_warned_of(capsys, tune, warned):
    config = toy_config(**{"towers.image.weights": "", "towers.image.tune": tune})
    blueprint = make_blueprint(config, sharding.make_mesh(config.mesh))
    telling.of_weights(blueprint, TrainState(jnp.int32(0), {}, (), {}))
    told = "warning: the image tower has no weights and does not train: it stays random"
    assert (told in capsys.readouterr().out) == warned


def test_more_seconds_than_a_whisper_hears_are_refused_before_the_start():
    settings = TowerConfig("whisper").encoder_settings()
    options = {"options": "config.data.speech", "overrides": "overrides", "imported": True}
    SpeechInputs(max_seconds=30.0).check(settings, **options)
    with pytest.raises(ValueError, match=r"max_seconds=31, but the tower has positions for 30 s"):
        SpeechInputs(max_seconds=31.0).check(settings, **options)


def test_tasks_of_a_file_take_the_place_of_the_configs(tmp_path):
    config = toy_config()
    (task,) = list(config.evaluation.tasks)[:1]
    plain = {"kind": "zero_shot", "source": "scenes:test?task=colour&n=4"}
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps({"mine": plain}))
    assert list(with_tasks(config, str(file)).evaluation.tasks) == ["mine"]
    assert list(with_tasks(config, task).evaluation.tasks) == [task]
