"""Runs are made once, resumed after a stop, and failures are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.reproduction import sections
from cwcl_jax.reproduction.experiments import Scale
from cwcl_jax.reproduction.runs import Run, RunMaker
from cwcl_jax.reproduction.sections import Maker


class Script(Run):
    """In place of a training run: a line of Python that ends with a code."""

    def folder(self, root):
        return root / self.name

    def command(self, root):
        del root
        return ["python", "-c", self.argument]

    def export_command(self, root):
        """Writes what ends an export, and counts."""
        folder = root / self.name / "export"
        code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(exist_ok=True); "
        code += "(p / 'cwcl_jax.json').open('a').write('x')"
        return ["python", "-c", code, str(folder)]


def script(name, code, after=None):
    return Script(name, "", code, after=after)


def appending(path, code=0):
    return f"import sys; open({str(path)!r}, 'a').write('x'); sys.exit({code})"


def test_a_run_is_made_once_also_by_another_command(tmp_path):
    once = script("a", appending(tmp_path / "count"))
    runner = RunMaker(tmp_path, say=lambda text: None)
    assert runner.complete(once) == runner.complete(once) == tmp_path / "a"
    again = RunMaker(tmp_path, say=lambda text: None)
    again.complete(once)
    assert (tmp_path / "count").read_text() == "x"
    assert again.seconds == runner.seconds > 0


def test_what_a_run_starts_from_is_made_and_exported_first(tmp_path):
    first = script("first", appending(tmp_path / "order"))
    exported = tmp_path / "first" / "export" / "cwcl_jax.json"
    both = [str(tmp_path / "order"), str(exported)]
    check = f"[open(path).read() == 'x' or 1 / 0 for path in {both}]"
    for _ in range(2):  # also by another command: neither run nor export is made again
        runner = RunMaker(tmp_path, say=lambda text: None)
        for name in ("second", "third"):
            runner.complete(script(name, check, after=first))
        assert [command[2] for command in runner.commands].count(check) == 2
        assert len(runner.commands) == 4
        assert exported.read_text() == "x"


def test_other_settings_run_again(tmp_path):
    for comment in ("", " # other"):
        runner = RunMaker(tmp_path, say=lambda text: None)
        runner.complete(script("a", appending(tmp_path / "count") + comment))
    assert (tmp_path / "count").read_text() == "xx"


def test_a_stopped_run_stops_the_command_and_goes_on_later(tmp_path):
    stopped = (
        f"import os, sys; done = os.path.exists({str(tmp_path / 'half')!r}); "
        f"open({str(tmp_path / 'half')!r}, 'w'); sys.exit(0 if done else 75)"
    )
    with pytest.raises(SystemExit) as error:
        RunMaker(tmp_path, say=lambda text: None).complete(script("a", stopped))
    assert error.value.code == 75
    record = json.loads((tmp_path / "a" / "reproduce.json").read_text())
    assert not record["complete"]
    runner = RunMaker(tmp_path, say=lambda text: None)
    runner.complete(script("a", stopped))
    assert runner.seconds > record["seconds"]  # both parts


def test_failures_name_the_log(tmp_path):
    runner = RunMaker(tmp_path, say=lambda text: None)
    with pytest.raises(RuntimeError, match=r"ended with code 1 .*reproduce\.log.*oh no"):
        runner.complete(script("a", "raise SystemExit('oh no')"))
    with pytest.raises(ConfigError, match="ended with code 2"):
        runner.complete(script("b", "import sys; sys.exit(2)"))


def test_command_names_config_seed_and_the_run_before(tmp_path):
    first = Run("first", "configs/speech_cwcl.py", "loss=contrastive", seed=1000)
    run = Run(
        "next", "configs/speech_cwcl.py", "init={init}", ("--config.total_steps=5",), 2, first
    )
    command = run.command(tmp_path)
    assert f"--config=configs/speech_cwcl.py:init={tmp_path}/first-seed1000" in command
    assert "--config.seed=2" in command
    assert command[-1] == "--config.total_steps=5"
    assert f"--workdir={tmp_path}/next-seed2" in command
    export = first.export_command(tmp_path)
    assert f"--source={tmp_path}/first-seed1000" in export
    # what the config file looks for when init names a run
    assert f"--output={tmp_path}/first-seed1000/export" in export


# A run that takes its time, and saves when it is asked to stop.
TRAINING = """
import pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    (here / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(here / "ready").touch()
time.sleep(60)
(here / "trained on").touch()
"""
# Who starts the tests in the background may have made them ignore Ctrl-C.
COMMAND = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from cwcl_jax.reproduction.runs import Run, RunMaker
class Script(Run):
    def command(self, root):
        return ["python", "-c", self.argument, str(root)]
RunMaker(Path(sys.argv[1])).complete(Script("a", "", sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.multiprocess
def test_a_stop_reaches_the_run_which_saves(tmp_path, number):
    """To all of the terminal's processes, as Ctrl-C does, or to the command alone."""
    command = [sys.executable, "-c", COMMAND, str(tmp_path), TRAINING]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert b"Traceback" not in errors
    assert (tmp_path / "saved").exists()
    assert not json.loads((tmp_path / "a-seed0" / "reproduce.json").read_text())["complete"]


def test_settings_that_are_refused_leave_the_record_of_the_run_before(tmp_path):
    RunMaker(tmp_path, say=lambda text: None).complete(script("a", "pass"))
    record = (tmp_path / "a" / "reproduce.json").read_text()
    refused = "import sys; print('error: give another --workdir'); sys.exit(2)"
    with pytest.raises(ConfigError, match="another --runs"):
        RunMaker(tmp_path, say=lambda text: None).complete(script("a", refused))
    assert (tmp_path / "a" / "reproduce.json").read_text() == record


def test_a_record_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "reproduce.json").write_text('{"command": ["py')
    with pytest.raises(ConfigError, match=r"reproduce\.json is incomplete: delete it"):
        RunMaker(tmp_path, say=lambda text: None).complete(script("a", "pass"))


def test_entries_in_another_order_are_the_same_run(tmp_path):
    """As runs are called that were made when a table's entries came first."""

    def record(argument):
        run = Run("a", "configs/x.py", argument)
        run.folder(tmp_path).mkdir(exist_ok=True)
        made = {"command": run.command(tmp_path), "seconds": 7.0, "complete": True}
        (run.folder(tmp_path) / "reproduce.json").write_text(json.dumps(made))

    runner = RunMaker(tmp_path, say=lambda text: None)
    record("loss=contrastive,data=/data")
    runner.complete(Run("a", "configs/x.py", "data=/data,loss=contrastive"))
    assert runner.seconds == 7
    # Of two entries of one name the last one holds.
    record("batch=32,batch=64")
    with pytest.raises((ConfigError, RuntimeError), match="ended with code"):
        RunMaker(tmp_path, say=lambda text: None).complete(
            Run("a", "configs/x.py", "batch=64,batch=32")
        )


def test_other_classes_are_evaluated_once_and_the_page_has_the_command(tmp_path, monkeypatch):
    task = {"kind": "alignment", "seed": 0}
    config = {"evaluation": {"tasks": {"alignment": task}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes, commands = [1, 0], []

    def evaluate(command, log):
        commands.append(command)
        # A stop may come while the values per item are written.
        (log.parent / "items").mkdir(exist_ok=True)
        (log.parent / "items" / "alignment.npz").touch()
        log.touch()
        code = codes.pop(0)
        if not code:
            (log.parent / "results.md").touch()
        return code

    monkeypatch.setattr(sections, "run_process", evaluate)
    with pytest.raises(ConfigError, match="with other classes failed"):
        Maker(RunMaker(tmp_path), Scale(), [0], tmp_path)._other_classes(tmp_path)
    for _ in range(2):
        maker = Maker(RunMaker(tmp_path), Scale(), [0], tmp_path)
        assert maker._other_classes(tmp_path) == tmp_path / "figure8"
        assert maker.runner.commands == commands[:1]
    assert len(commands) == 2
    tasks = json.loads((tmp_path / "figure8" / "tasks.json").read_text())
    assert tasks == {"alignment": task | {"seed": 1}}
