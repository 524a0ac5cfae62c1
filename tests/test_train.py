"""The command line of training: overrides, mistakes, exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cwcl_jax.cli import BAD_CONFIG, DONE, PREEMPTED

ROOT = Path(__file__).parent.parent


def run(*arguments):
    return subprocess.run(
        ["timeout", "-s", "KILL", "600", sys.executable, "-m", "cwcl_jax.train", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (["--config=configs/nope.py"], "configs/nope.py: there is no such file"),
        (["--config=configs/lit_cwcl.py:los=cwcl"], "did you mean 'loss'"),
        (
            ["--config=configs/lit_cwcl.py", "--config.optimizer.learnin_rate=1"],
            "no field 'learnin_rate'; did you mean 'learning_rate'",
        ),
        (["--config=configs/lit_cwcl.py", "--config.seed=x"], "--config.seed=x"),
        (["--config=configs/lit_cwcl.py", "--confg=x"], "Did you mean: config"),
        (["--config=configs/lit_cwcl.py", "now"], "unexpected argument 'now'"),
        (["--config=configs", "--config.seed=3"], "--config=configs: this is a folder"),
        (["--config=configs"], "--config=configs: this is a folder"),
        (
            ["--config=configs/lit_cwcl.py", "--config.optimizer.name.x=3"],
            "--config.optimizer.name.x=3: the config has no such field",
        ),
        (
            ["--config=configs/lit_cwcl.py", "--workdir=gs://bucket/run"],
            "--workdir=gs://bucket/run: a bucket must be mounted",
        ),
        (
            ["--config=configs/lit_cwcl.py", "--workdir=README.md"],
            "--workdir=README.md cannot be made: File exists",
        ),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(arguments, message):
    is_told(run(*arguments), message)


def is_told(result, message):
    assert result.returncode == BAD_CONFIG
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (\n", ", line 1: SyntaxError: '(' was never closed"),
        ("import nomodule\n", ", line 1: ModuleNotFoundError: No module named 'nomodule'"),
        ("def get_config():\n    return {}['nope']\n", ", line 2: KeyError: 'nope'"),
        ("def get_config():\n    open('/nowhere/a')\n", "No such file or directory: '/nowhere/a'"),
        ("def get_config():\n    return 3\n", "get_config() must return a config, got 3"),
        ("x = 1\n", "the file defines no function get_config()"),
    ],
)
def test_mistake_in_the_config_file_is_one_line_and_exit_code_2(tmp_path, text, message):
    file = tmp_path / "mine.py"
    file.write_text(text)
    is_told(run(f"--config={file}"), message)


@pytest.mark.multiprocess
def test_paper_recipe_without_its_data_names_path_and_option(tmp_path):
    result = run("--config=configs/lit_cwcl.py:paper", f"--workdir={tmp_path}")
    assert result.returncode == BAD_CONFIG
    assert "/data/cc12m/00000.tar" in result.stderr
    assert "--config.data.train=" in result.stderr


@pytest.mark.multiprocess
def test_short_default_run_with_overrides(tmp_path):
    workdir = tmp_path / "run"
    overrides = [
        "--config.seed=3",
        "--config.total_steps=2",
        "--config.global_batch_size=32",
        "--config.loss.name=contrastive",
        "--config.optimizer.learning_rate=3e-4",
        "--config.evaluation.tasks.retrieval.max_items=50",
        "--config.evaluation.tasks.shape.max_items=100",
        "--config.evaluation.tasks.colour.max_items=100",
        "--config.evaluation.tasks.combination.max_items=100",
    ]
    result = run("--config=configs/lit_cwcl.py", f"--workdir={workdir}", *overrides)
    assert result.returncode == DONE, result.stderr
    assert "locked" in result.stdout
    assert "chance" in result.stdout
    assert (workdir / "template_robustness.png").exists()
    again = run("--config=configs/lit_cwcl.py", f"--workdir={workdir}", *overrides)
    assert again.returncode == DONE
    assert "is complete (2 steps)" in again.stdout


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_in_the_first_seconds_ends_with_75(tmp_path, number):
    """While jax is imported: there is nothing to save, and no crash to be told."""
    command = [sys.executable, "-m", "cwcl_jax.train", "--config=tests/training/toy_file.py"]
    child = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        maps = Path(f"/proc/{child.pid}/maps")
        deadline = time.monotonic() + 60
        while "_multiarray_umath" not in maps.read_text():  # numpy, before jax
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == PREEMPTED, errors
    assert "stopped before training began" in errors
    assert "Traceback" not in errors
