"""The command line of training: overrides, mistakes, exit codes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cwcl_jax import train
from cwcl_jax.cli import BAD_CONFIG, DONE, PREEMPTED
from cwcl_jax.config import ConfigError
from cwcl_jax.training.workdir import made_folder, only_user

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_the_projects_folder(monkeypatch):
    monkeypatch.chdir(ROOT)


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
        (
            ["--config=configs/lit_cwcl.py", "--config.optimizer.lr=1"],
            "--config.optimizer.lr: the config has no field 'lr'; did you mean 'learning_rate'?",
        ),
        (
            ["--config=configs/lit_cwcl.py", "--config.towers.text.dtype=float61"],
            "config.towers.text.dtype must be 'float32' or 'bfloat16'",
        ),
        (["--config=configs/lit_cwcl.py", "--config.seed=x"], "--config.seed=x"),
        (["--config=configs/lit_cwcl.py", "--workdr=x"], "--workdr; did you mean --workdir?"),
        (["--confg=x"], "unknown option --confg; did you mean --config?"),
        (["--config.seed=3"], "--config.seed=3: --config is missing"),
        (["--config=configs/lit_cwcl.py", "now"], "unexpected argument 'now'"),
        (["--config=configs", "--config.seed=3"], "--config=configs: this is a folder"),
        (["--config=configs"], "--config=configs: this is a folder"),
        (
            ["--config=configs/lit_cwcl.py", "--config.optimizer.name.x=3"],
            "--config.optimizer.name.x=3: the config has no such field",
        ),
        (
            ["--config=configs/lit_cwcl.py", "--workdir=memory://bucket/run"],
            "--workdir=memory://bucket/run: checkpoints can be written only to s3 and gs",
        ),
        (
            ["--config=configs/lit_cwcl.py", "--workdir=README.md"],
            "--workdir=README.md cannot be created: File exists",
        ),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    is_told(arguments, message, capsys)


def test_each_wrong_setting_is_a_line(capsys):
    wrong = ["--config.dtype=float61", "--config.total_steps=0"]
    assert train.main(["--config=configs/lit_cwcl.py", *wrong]) == BAD_CONFIG
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line[:16] for line in lines] == ["error: config.to", "error: config.dt"]


def test_unknown_overrides_do_not_hide_what_else_is_wrong(capsys):
    wrong = ["--config.dtpe=float32", "--config.total_steps=0", "--config.seed", "x",
             "--config.optimizer.lr=1"]  # fmt: skip
    assert train.main(["--config=configs/lit_cwcl.py", *wrong]) == BAD_CONFIG
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4, lines
    assert all(line.startswith("error: ") for line in lines)
    for name in ("dtpe", "seed", "optimizer.lr", "total_steps"):
        assert sum(f"config.{name}" in line for line in lines) == 1, (name, lines)


def is_told(arguments, message, capsys):
    assert train.main(arguments) == BAD_CONFIG
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1


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
def test_mistake_in_the_config_file_is_one_line_and_exit_code_2(tmp_path, text, message, capsys):
    file = tmp_path / "mine.py"
    file.write_text(text)
    is_told([f"--config={file}"], message, capsys)


def test_a_mistake_ends_the_process_with_exit_code_2():
    command = [sys.executable, "-m", "cwcl_jax.train", "--config=configs/nope.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == BAD_CONFIG
    assert done.stderr == (
        "error: --config=configs/nope.py: there is no such file; try --config=configs/lit_cwcl.py\n"
    )


def test_one_process_may_read_several_command_lines(capsys):
    """Overrides of the one are not in the next; hyphens and spaces are as good."""
    for words, seed, workdir in (
        (["--config.seed=3", "--workdir=a"], 3, "a"),
        (["--config.seed", "4"], 4, None),
    ):
        options = train.main.parse(["--config", "configs/lit_cwcl.py", *words])
        assert (options.config.seed, options.workdir) == (seed, workdir)
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python -m cwcl_jax.train ")
    assert "The same command resumes an interrupted run" in shown


def test_paper_recipe_without_its_data_names_path_and_option(tmp_path, capsys):
    workdir = tmp_path / "runs" / "paper"
    code = train.main(["--config=configs/lit_cwcl.py:paper", f"--workdir={workdir}"])
    assert code == BAD_CONFIG
    said = capsys.readouterr().err
    assert "/data/cc12m/00000.tar" in said
    assert "--config.data.train=" in said
    assert list(tmp_path.iterdir()) == []  # neither the folder nor its parent is left


def test_a_refused_start_removes_no_folder_that_is_not_its_own(tmp_path):
    before, new = tmp_path / "before", tmp_path / "new"
    before.mkdir()

    def refused(file):
        file.write_text("mine")
        raise ConfigError("wrong")

    with pytest.raises(ConfigError), made_folder(before), only_user(before):
        raise ConfigError("wrong")
    with pytest.raises(ConfigError), made_folder(new), only_user(new):
        refused(new / "notes")
    assert (before / "lock").exists()
    assert (new / "notes").exists()


def test_short_default_run_with_overrides(tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [
        "--config=configs/lit_cwcl.py",
        f"--workdir={workdir}",
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
    assert train.main(arguments) == DONE
    said = capsys.readouterr().out
    assert "locked" in said
    assert "chance" in said
    assert (workdir / "template_robustness.png").exists()
    assert train.main(arguments) == DONE
    assert "is complete (2 steps)" in capsys.readouterr().out


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
