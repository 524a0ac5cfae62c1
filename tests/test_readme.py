"""Options, config files and fields that a command of the documentation names exist; links too.

A command is what stands in an indented block or between backticks and begins with `python`,
`launch/` or `sbatch`. Sections called "Measured" are records of their day and left out.
"""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("[cl]*/**/README.md")),
    ROOT / "configs/RESULTS.md",
]
_RECORDS = re.compile(r"^## Measured\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
TEXTS = [_RECORDS.sub("", path.read_text(encoding="utf-8")) for path in DOCUMENTS]
LINKED = [
    *DOCUMENTS,
    *(ROOT / name for name in ("BUILD_NOTES.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    ROOT / "tests/README.md",
    *sorted(ROOT.glob("configs/results/*.md")),
]


def commands() -> list[str]:
    """The documented commands, without comments; those that prepare an environment count too."""
    body = re.sub(r"\\\n\s*", "", "\n\n".join(TEXTS))
    lines = [line.strip() for line in body.splitlines() if line.startswith("    ")]
    named = re.findall(r"`((?:python|sbatch|launch/)[^`]*)`", body)
    lines += [" ".join(command.split()) for command in named]
    lines += [
        f"python -m cwcl_jax.train {c}" for c in re.findall(r"^\| `(--config=[^`]*)`", body, re.M)
    ]
    found = [re.sub(r"\s+#.*$", "", line) for line in lines]
    start = re.compile(r"(python3?|sbatch|gcloud|kubectl|launch/\S+\.\w+) \S")
    return list(dict.fromkeys(line for line in found if start.match(line)))


def block_with(words: str) -> str:
    """The first indented block of the documentation that has these words, as a file."""
    blocks = re.findall(r"(?:^(?:    .*)?\n)+", "\n".join(TEXTS), re.M)
    return next(textwrap.dedent(block) for block in blocks if words in block).strip() + "\n"


def test_there_are_commands():
    assert len(commands()) > 15


# What stands for a word of the user's.
_PLACEHOLDERS = re.compile(r"\.\.\.|:ARGUMENT|--config\.FIELD=VALUE|--\w+=\.\.\.")


@pytest.mark.parametrize("command", [c for c in commands() if "-m cwcl_jax." in c])
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    """By the command itself, with every option, config file and field of the config."""
    rows = np.ones((4, 8), np.float32)
    np.savez(tmp_path / "features.npz", profile=rows, compound=rows)
    np.savez(tmp_path / "dumped.npz", u=rows, v=rows)
    # The example is documented as it is run: copied into a folder of the user's own.
    (tmp_path / "eeg.py").symlink_to(ROOT / "configs" / "eeg.py")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "mine.py").write_text(block_with("def get_config").partition("python -m")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "configs")  # eeg.py names its own classes
    module, _, rest = command.partition("-m cwcl_jax.")[2].partition(" ")
    given = shlex.split(rest.replace("[", " ").replace("]", " "))
    words = [
        re.sub(r"^--config=(FILE|configs/X\.py)$", "--config=configs/lit_cwcl.py", word)
        for word in given
        if not _PLACEHOLDERS.fullmatch(word)
    ]
    importlib.import_module(f"cwcl_jax.{module}").main.parse(words)


def anchor(heading: str) -> str:
    """The name by which GitHub links a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", LINKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, part = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if part:
            text = path.read_text(encoding="utf-8")
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            assert part in map(anchor, headings), target
