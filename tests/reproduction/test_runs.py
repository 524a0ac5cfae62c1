"""Runs are made once, resumed after a stop, and failures are named."""

from __future__ import annotations

import json

import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.reproduction.runs import Run, Runner


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
    runner = Runner(tmp_path, say=lambda text: None)
    assert runner.complete(once) == runner.complete(once) == tmp_path / "a"
    again = Runner(tmp_path, say=lambda text: None)
    again.complete(once)
    assert (tmp_path / "count").read_text() == "x"
    assert again.seconds == runner.seconds > 0


def test_what_a_run_starts_from_is_made_and_exported_first(tmp_path):
    first = script("first", appending(tmp_path / "order"))
    exported = tmp_path / "first" / "export" / "cwcl_jax.json"
    both = [str(tmp_path / "order"), str(exported)]
    check = f"[open(path).read() == 'x' or 1 / 0 for path in {both}]"
    for _ in range(2):  # also by another command: neither run nor export is made again
        runner = Runner(tmp_path, say=lambda text: None)
        for name in ("second", "third"):
            runner.complete(script(name, check, after=first))
        assert [command[2] for command in runner.commands].count(check) == 2
        assert len(runner.commands) == 4
        assert exported.read_text() == "x"


def test_other_settings_run_again(tmp_path):
    for comment in ("", " # other"):
        runner = Runner(tmp_path, say=lambda text: None)
        runner.complete(script("a", appending(tmp_path / "count") + comment))
    assert (tmp_path / "count").read_text() == "xx"


def test_a_stopped_run_stops_the_command_and_goes_on_later(tmp_path):
    stopped = (
        f"import os, sys; done = os.path.exists({str(tmp_path / 'half')!r}); "
        f"open({str(tmp_path / 'half')!r}, 'w'); sys.exit(0 if done else 75)"
    )
    with pytest.raises(SystemExit) as error:
        Runner(tmp_path, say=lambda text: None).complete(script("a", stopped))
    assert error.value.code == 75
    record = json.loads((tmp_path / "a" / "reproduce.json").read_text())
    assert not record["complete"]
    runner = Runner(tmp_path, say=lambda text: None)
    runner.complete(script("a", stopped))
    assert runner.seconds > record["seconds"]  # both parts


def test_failures_name_the_log(tmp_path):
    runner = Runner(tmp_path, say=lambda text: None)
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
