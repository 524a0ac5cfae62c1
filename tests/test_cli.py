"""Flags of the entry files."""

import sys
from pathlib import Path

import pytest

from cwcl_jax import cli
from cwcl_jax.config import ConfigError

CONFIG = {"towers": {"speech": {"overrides": {"time_masks": 2, "width": 8}}, "text": {}}}


def overrides(*arguments):
    settings, rest = cli._settings_of_encoders([*arguments, "--config.seed=1"])
    assert rest == ["--config.seed=1"]
    towers = cli.with_settings(CONFIG, settings)["towers"]
    return {name: tower.get("overrides") for name, tower in towers.items()}


def test_settings_of_an_encoder_are_added_to_those_of_the_config():
    """SpecAugment of the recipe stays when another setting is given."""
    option = "--config.towers.speech.overrides"
    for given in ([f"{option}.width=16"], [option, "{'width': 16}"], [f"{option}={{'width': 16}}"]):
        assert overrides(*given)["speech"] == {"time_masks": 2, "width": 16}
    assert overrides("--config.towers.text.overrides.causal=true")["text"] == {"causal": True}
    assert overrides(f"{option}.activation=relu")["speech"]["activation"] == "relu"
    assert CONFIG["towers"]["speech"]["overrides"] == {"time_masks": 2, "width": 8}


def test_settings_of_no_tower_and_no_settings_are_named():
    with pytest.raises(ConfigError, match=r"towers\.sound\.overrides: the towers are speech, text"):
        overrides("--config.towers.sound.overrides.width=1")
    with pytest.raises(ConfigError, match="settings by name are expected"):
        overrides("--config.towers.text.overrides=7")


def test_a_command_in_this_process_leaves_no_folder_to_import_from(tmp_path):
    before = [*sys.path]

    @cli.command(lambda parser: None, config=True)
    def run(options):
        cli._make_importable(tmp_path)  # as reading a config does
        assert str(tmp_path) in sys.path

    assert run([]) == 0
    assert sys.path == before


def test_a_shipped_config_stands_in_for_one_that_is_not_there(tmp_path, monkeypatch, capsys):
    """An installed package has its configs in any folder; a user's file of that name goes first."""
    monkeypatch.chdir(tmp_path)
    found = cli._found("configs/lit_cwcl.py:loss=contrastive")
    path, _, argument = found.partition(":")
    assert argument == "loss=contrastive"
    shipped = Path(__file__).parent.parent / "configs" / "lit_cwcl.py"
    assert Path(path).read_text() == shipped.read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"configs/lit_cwcl.py is not in this folder; using {path}"
    for other in ("configs/mine.py", "lit_cwcl.py", "other/configs/lit_cwcl.py"):
        assert cli._found(other) == other
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lit_cwcl.py").write_text("mine")
    assert cli._found("configs/lit_cwcl.py") == "configs/lit_cwcl.py"
    assert capsys.readouterr().err == ""
