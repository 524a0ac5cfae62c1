"""Sinks of metrics besides the record file."""

import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cwcl_jax.config import ConfigError
from cwcl_jax.training.metrics import WeightsAndBiases, check_writers, make_writers
from tests.training.toy import toy_config


def test_tensorboard_files_hold_the_values(tmp_path):
    for writer in make_writers(tmp_path, toy_config(**{"logging.tensorboard": True}), 0):
        writer.write(1, {"loss": 0.5})
        writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def tensorboard_events(folder):
    """All events in the order of their files: length, checksum, event, checksum."""
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def shown_by_tensorboard(folder):
    """Steps by tag: a session's start hides what came before with its step or a later one."""
    shown = {}
    for event in tensorboard_events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {tag: [s for s in steps if s < event.step] for tag, steps in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append(event.step)
    return shown


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, monkeypatch):
    config = toy_config(**{"logging.tensorboard": True})

    def session(number, start, steps):
        # Files are named after the second of their start.
        monkeypatch.setattr("time.time", lambda: 1_800_000_000.0 + number)
        for writer in make_writers(tmp_path, config, start):
            for step in steps:
                writer.write(step, {"loss": 0.5})
            if 4 in steps:
                writer.write(4, {"evaluation/accuracy": 0.5})
            writer.close()

    folder = tmp_path / "tensorboard"
    session(1, 0, (1, 2))  # killed before its first checkpoint
    session(2, 0, (1, 2, 3, 4, 5))
    session(3, 4, (5, 6))
    assert shown_by_tensorboard(folder) == {"loss": [1, 2, 3, 4, 5, 6], "evaluation/accuracy": [4]}


def test_what_two_starts_of_one_second_write_to_tensorboard_stays(tmp_path, monkeypatch):
    """The loop of a short run, and its evaluation at the end."""
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)
    config = toy_config(**{"logging.tensorboard": True})
    for start, values in ((0, {"loss": 0.5}), (2, {"evaluation/accuracy": 0.5})):
        for writer in make_writers(tmp_path, config, start):
            writer.write(2, values)
            writer.close()
    shown = shown_by_tensorboard(tmp_path / "tensorboard")
    assert shown == {"loss": [2], "evaluation/accuracy": [2]}


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


def test_weights_and_biases_goes_on_with_the_run_of_the_folder_alone(tmp_path, monkeypatch):
    calls = []
    stub = types.ModuleType("wandb")
    stub.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for parent in ("first", "second", "first"):
        workdir = tmp_path / parent / "seed0"
        workdir.mkdir(parents=True, exist_ok=True)
        WeightsAndBiases("scenes", workdir, toy_config())
    first, second, again = (options["id"] for options in calls)
    assert first == again != second
    assert {options["name"] for options in calls} == {"seed0"}


def test_missing_wandb_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"cwcl_jax\[wandb\]"):
        check_writers(toy_config(**{"logging.wandb_project": "scenes"}))
    check_writers(toy_config())
