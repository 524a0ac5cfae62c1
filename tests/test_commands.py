"""The quick ones among the documented commands run as they are written."""

import importlib
import re
import shlex

import pytest

from tests import drill_commands
from tests.drill_commands import QUICK, exempt, in_order, prepare
from tests.test_readme import block_with, commands

RUNNABLE = [command for command in commands() if not exempt(command)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documented")
    prepare(path)
    return path


@pytest.mark.parametrize("command", [c for c in RUNNABLE if QUICK.search(c)])
def test_a_quick_command_runs_as_written(command, folder, monkeypatch):
    """In this process where it is one of ours: its imports and programs are there already."""
    monkeypatch.chdir(folder)
    name, _, rest = command.partition("-m cwcl_jax.")[2].partition(" ")
    if name:
        code = importlib.import_module(f"cwcl_jax.{name}").main(shlex.split(rest))
    else:
        code = drill_commands.run(command, folder, timeout=100).code
    assert code == 0


COMMANDS = sorted({found[1] for c in RUNNABLE if (found := re.search(r"-m (cwcl_jax\.\S+)", c))})


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_every_documented_command(module, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    assert f"usage: python -m {module}" in capsys.readouterr().out


def test_a_command_comes_after_those_that_make_its_runs():
    train, export = "python -m cwcl_jax.train --config=a.py", "python -m cwcl_jax.export"
    found = [f"{export} --source=runs/a-x-1", f"{train}:init=runs/b", f"{train} --workdir=runs/b"]
    assert in_order([*found, f"{train}:x=1"]) == [found[2], found[1], f"{train}:x=1", found[0]]
    # A run that no command makes is the user's, and nothing waits for it.
    assert in_order([f"{export} --source=runs/mine", train])[0].startswith(export)


def test_most_documented_commands_are_run():
    """The exemptions stay a short list; each pattern still stands for a command."""
    assert len(RUNNABLE) > len(commands()) / 2
    for pattern in drill_commands.EXEMPT:
        assert any(re.search(pattern, command) for command in commands()), pattern


def test_the_loss_in_ten_lines_runs_as_it_stands():
    """It learns: every pair is found in the batch."""
    names = {}
    exec(block_with("optax.adam(1e-2)"), names)
    assert names["diagnostics"]["accuracy_v_to_u"] > 0.9
