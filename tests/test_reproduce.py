"""The command of the reproduction: pages from short runs (slow), commands for clusters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cwcl_jax.cli import BAD_CONFIG, DONE
from cwcl_jax.reproduce import paper_commands

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run(
        ["timeout", "-s", "KILL", "900", sys.executable, "-m", "cwcl_jax.reproduce", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_paper_scale_prints_the_commands():
    text = paper_commands([4, 6], 2)
    lines = [line for line in text.splitlines() if line.startswith("python")]
    assert len(lines) == (1 + 4) * 2 * 2
    assert len(set(lines)) == len(lines)
    assert "--config=configs/lit_cwcl.py:paper,loss=contrastive --config.seed=1" in text
    assert "--config=configs/speech_cwcl.py:paper,lock=both --config.seed=0" in text


@pytest.mark.multiprocess
def test_mistakes_are_one_line():
    for arguments, message in (
        ([], "nothing to do"),
        (["--table=3"], "--table=3: choose one of"),
        (["--table=four"], "numbers separated by commas"),
        (["--figure=9"], "--figure=9: choose one of"),
    ):
        result = run(*arguments)
        assert result.returncode == BAD_CONFIG, result.stderr
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_command_makes_runs_and_page(tmp_path):
    folders = [f"--output={tmp_path}/page", f"--runs={tmp_path}/runs"]
    what = ["--table=4", "--figure=5,6", "--seeds=2", "--steps=2"]
    result = run(*what, *folders)
    assert result.returncode == DONE, result.stderr
    text = (tmp_path / "page" / "README.md").read_text()
    for part in ("Table 4", "± ", "35.10", "figure5.png", "figure6.png", "--config.seed=1", "jax "):
        assert part in text, part
    for name in ("figure5.png", "figure6.png"):
        assert (tmp_path / "page" / name).stat().st_size > 10_000
    again = run(*what, *folders)
    assert again.stdout.count("complete, reused") == 4
