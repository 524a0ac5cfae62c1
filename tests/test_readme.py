"""Options, config files and fields that a command of the README names exist.

A command is what stands in an indented block or between backticks and begins with `python`,
`launch/` or `sbatch`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from cwcl_jax.config import to_plain
from cwcl_jax.reproduction.runs import load_experiment

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The README's commands, without comments; those that only prepare an environment count too."""
    body = re.sub(r"\\\n\s*", "", README)
    lines = [line.strip() for line in body.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`((?:python|sbatch|launch/)[^`]*)`", body)
    lines += [
        f"python -m cwcl_jax.train {c}" for c in re.findall(r"^\| `(--config=[^`]*)`", body, re.M)
    ]
    found = [re.sub(r"\s+#.*$", "", line) for line in lines]
    start = re.compile(r"(python3?|sbatch|gcloud|kubectl|launch/\S+\.\w+) \S")
    return list(dict.fromkeys(line for line in found if start.match(line)))


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", [c for c in commands() if "cwcl_jax." in c])
def test_every_option_of_a_command_exists(command, tmp_path, monkeypatch):
    rows = np.zeros((4, 8), np.float32)
    np.savez(tmp_path / "features.npz", profile=rows, compound=rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "configs")  # eeg.py names its own classes
    module = re.search(r"-m (cwcl_jax[\w.]*)", command)
    if module is None:
        return
    source = ROOT / (module[1].replace(".", "/") + ".py")
    text = source.read_text(encoding="utf-8")
    words = shlex.split(command.split(module[1], 1)[1].replace("[", " ").replace("]", " "))
    config = None
    for word in (word for word in words if word.startswith("--")):
        name, _, value = word[2:].partition("=")
        if name == "config":
            file, _, argument = value.partition(":")
            # The example is documented as it is run: copied into a folder of the user's own.
            file = "configs/eeg.py" if file == "eeg.py" else file
            if (ROOT / file).suffix == ".py" and file != "configs/X.py":
                config = load_experiment(str(ROOT / file), argument)
            assert "define_config_flag" in text
        elif name.startswith("config."):
            if config is not None:
                assert has_field(to_plain(config), name.split(".")[1:]), word
        else:
            known = name.replace("_", "[-_]").replace("-", "[-_]")
            assert re.search(rf"[\"'](--)?{known}[\"']", text), f"{source.name} has no {word}"


def has_field(config: dict, path: list[str]) -> bool:
    for part in path:
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True
