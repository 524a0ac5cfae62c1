"""Sinks of metrics besides the record file."""

import sys
import types

import pytest

from cwcl_jax.training.metrics import WeightsAndBiases, make_writers
from tests.training.toy import toy_config


def test_tensorboard_files_hold_the_values(tmp_path):
    for writer in make_writers(tmp_path, toy_config(**{"logging.tensorboard": True}), 0):
        writer.write(1, {"loss": 0.5})
        writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_weights_and_biases_gets_config_and_values(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    stub = types.ModuleType("wandb")
    stub.init = lambda **options: calls.append(("init", options)) or Run()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    config = toy_config(**{"logging.wandb_project": "scenes"})
    for writer in make_writers(tmp_path, config, 0):
        writer.write(3, {"loss": 0.5})
        writer.close()
    assert calls[0][1]["project"] == "scenes"
    assert calls[0][1]["config"]["loss"]["name"] == "cwcl"
    assert calls[1:] == [("log", 3, {"loss": 0.5}), ("finish",)]


def test_missing_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"cwcl_jax\[wandb\]"):
        WeightsAndBiases("scenes", tmp_path, toy_config())
