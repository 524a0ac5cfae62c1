"""The command of the reproduction: pages from short runs (slow), commands for clusters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cwcl_jax.cli import BAD_CONFIG, DONE
from cwcl_jax.config import ConfigError, to_json
from cwcl_jax.reproduce import main, paper_commands, reproduce
from cwcl_jax.reproduction.experiments import Scale
from cwcl_jax.reproduction.measures import measure
from cwcl_jax.reproduction.runs import load_experiment

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


def test_paper_scale_trains_every_experiment_once():
    text = paper_commands([], 2)
    commands = [line.split() for line in text.splitlines() if line.startswith("python")]
    options = [dict(part.split("=", 1) for part in c if "=" in part) for c in commands]
    settings = set()
    for option in options:
        config = load_experiment(*option["--config"].split(":"))
        settings.add((to_json(config), option["--config.seed"]))
    workdirs = {option["--workdir"] for option in options}
    assert len(settings) == len(workdirs) == len(commands) == (2 + 4 + 6 + 4 + 2) * 2
    # What an earlier table has is named, not trained again.
    shared = text.split("# Table 8\n")[1].splitlines()[:4]
    assert all(line.startswith("# as in Table 5: runs/speech_cwcl-paper") for line in shared)
    assert {line.split()[-1] for line in shared} <= workdirs


def test_tables_can_be_named_several_times(capsys):
    assert main(["--scale=paper", "--table=4", "--table=5,6", "--seeds=1"]) == DONE
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("# Table")] == [
        "# Table 4",
        "# Table 5",
        "# Table 6",
    ]


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for arguments, message in (
        ([], "nothing to do"),
        (["--table=3"], "--table=3: choose one of"),
        (["--table=four"], "--table: 'four' is not a list of whole numbers from 1 on"),
        (["--figure=9"], "--figure=9: choose one of"),
        (["--table=4", "--seeds=0"], "--seeds: '0' is not a whole number from 1 on"),
        (["--table=4", "--seeds=1001"], "--seeds=1001: at most 1000"),
        (["--scale=paper", "--steps=4"], "--scale=paper prints the commands of tables: leave --st"),
    ):
        assert main(arguments) == BAD_CONFIG
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("option", ["output", "runs"])
def test_a_folder_that_cannot_be_made_is_named_before_any_run(tmp_path, option):
    (tmp_path / "file").touch()
    folders = {"output": tmp_path / "page", "runs": tmp_path / "made"}
    folders[option] = tmp_path / "file" / "inside"
    with pytest.raises(ConfigError, match=rf"--{option}=.*inside cannot be made: Not a directory"):
        reproduce([4], [], [], seeds=1, scale=Scale(), made_by="", **folders)


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
    numbers = json.loads((tmp_path / "page" / "results.json").read_text())
    assert set(numbers) == {path.name for path in (tmp_path / "runs").iterdir()}
    shares = numbers["scenes-cl-seed1"]["retrieval"]
    measured = measure(tmp_path / "runs/scenes-cl-seed1", "retrieval", "image_to_text_rank@1")
    assert 100 * shares["text_retrieval_recall@1"] == pytest.approx(measured)
    again = run(*what, *folders)
    assert again.stdout.count("complete, reused") == 4
