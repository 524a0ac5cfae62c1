"""The planner's command: the whole plan in a fresh process, clear mistakes, full scale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cwcl_jax import plan as command
from cwcl_jax.cli import BAD_CONFIG, DONE
from cwcl_jax.config import ConfigError
from cwcl_jax.plan import without_files
from cwcl_jax.reproduction.runs import load_experiment
from tests.planning.wide import wide_config
from tests.training.toy import toy_config

ROOT = Path(__file__).parent.parent
CONFIG = f"--config={ROOT}/configs/lit_cwcl.py"


def plan(*arguments, **options):
    """The whole text."""
    return "\n\n".join(command.plan(*arguments, **options))


def run(*arguments, timeout=300):
    return subprocess.run(
        ["timeout", "-s", "KILL", str(timeout), sys.executable, "-m", "cwcl_jax.plan", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.multiprocess
def test_command_prints_the_whole_plan(tmp_path):
    output = tmp_path / "plan.txt"
    # More devices than this machine, or the test process, has.
    result = run(
        "--config=configs/lit_cwcl.py", "--mesh=v5ex64", "--nocompile", "--variants",
        f"--output={output}",
    )  # fmt: skip
    assert result.returncode == DONE, result.stderr
    for text in (
        "64 x v5e",
        "locked",
        "optimizer state",
        "not known; they are read from the step compiled for v5e",
        "FLOP in matrix products",
        "device-hours",
        "image tower precomputed (embed)",
        "mesh.fsdp=8",
        "remat=full",
        "loss.form=ring",
        "accumulation_steps=4",
    ):
        assert text in result.stdout, text
    assert output.read_text() == result.stdout.rstrip("\n") + "\n"


def test_a_mistake_is_one_line(capsys):
    assert command.main([CONFIG, "--mesh=b100x4"]) == BAD_CONFIG
    said = capsys.readouterr().err
    assert "unknown chip; did you mean" in said
    assert len(said.strip().splitlines()) == 1


def test_a_place_for_the_plan_is_looked_for_before_planning(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "no" / "plan.txt"):
        assert command.main([CONFIG, "--mesh=a100", f"--output={place}"]) == BAD_CONFIG
        said = capsys.readouterr().err
        assert said.startswith(f"error: --output={place}: name a file in a folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, r"config\.mesh\.fsdp=3 does not divide"),
        ({"data.text.max_tokens": 17}, r"max_tokens=17 exceeds the 16 positions"),
        ({"data.image.size": 100}, r"data\.image\.size=100, but the tower reads 32 x 32"),
        ({"loss.name": "supervised"}, r"needs labels: set --config\.data\.labels"),
        ({"loss.name": "cellclip", "loss.weight_function": "relu"}, r"config\.loss: .*contradicts"),
        ({"towers.text.preset": "Q"}, r"config\.towers: unknown preset of encoder 'text': 'Q'"),
        (
            {"towers.text.encoder": "txt", "towers.text.weights": "x"},
            r"config\.towers\.text\.encoder: .*'text'",
        ),
        ({"towers.image.pooling": "max"}, r"config\.towers: pooling of a ViT is"),
    ],
)
def test_what_training_would_refuse_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan(wide_config(**changes), "a100x4", compile_step=False)


def test_a_batch_that_does_not_divide_is_an_error():
    config = wide_config(global_batch_size=30)
    with pytest.raises(ConfigError, match=r"global_batch_size=30 is not divisible by 4 devices"):
        plan(config, "a100x4", compile_step=False)


def test_a_wrong_share_is_an_error():
    with pytest.raises(ConfigError, match=r"--efficiency=2: a fraction"):
        plan(wide_config(), "a100x4", efficiency=2)


def test_weights_that_are_not_here_are_not_asked_for():
    config = without_files(load_experiment("configs/lit_cwcl.py", "paper"))
    assert {tower.weights for tower in config.towers.values()} == {""}


def test_sizes_that_stand_in_absent_weights_are_asked_for():
    config = load_experiment("configs/speech_cwcl.py", "paper,init=/data/my-whisper")
    with pytest.raises(ConfigError, match=r"--config\.towers\.speech\.preset=.*whisper-small"):
        without_files(config)


@pytest.mark.parametrize("tune", ["last:1", "head", r".*/attention/.*"])
def test_towers_that_train_in_part_are_planned(tune):
    config = wide_config(**{"towers.text.tune": tune})
    assert "device-hours" in plan(config, "a100x4", compile_step=False)


def test_optimizers_that_name_leaves_are_planned():
    changes = {
        "optimizer.layer_decay": 0.9,
        "optimizer.multipliers": ("towers/image/encoder/.*=0.1", ".*/text/encoder/blocks/1/.*=2"),
        "optimizer.decay": "towers/text/encoder/.*/kernel",
        "towers.image.tune": "all",
    }
    text = plan(wide_config(**changes), "a100x4", compile_step=False)
    assert "device-hours" in text
    with pytest.raises(ConfigError, match=r"multipliers entry 'towers/speech/\.\*=1' matches no"):
        plan(
            wide_config(**{"optimizer.multipliers": ("towers/speech/.*=1",)}),
            "a100x4",
            compile_step=False,
        )


def test_attention_that_must_be_cudnns_is_planned_without_cudnn():
    changes = {"towers.text.attention": "cudnn", "dtype": "bfloat16"}
    text = plan(wide_config(**changes), "a100x4", compile_step=False)
    assert "attention runs in cuDNN in " in text


@pytest.mark.parametrize(("mesh", "dtype"), [("v5ex4", "bfloat16"), ("a100x4", "float32")])
def test_attention_that_a_chip_does_not_have_is_refused(mesh, dtype):
    config = toy_config(**{"towers.text.attention": "cudnn", "dtype": dtype})
    with pytest.raises(ConfigError, match=r"attention='cudnn' cannot run on .*it needs"):
        plan(config, mesh, compile_step=False)


MILLION = ["--config.global_batch_size=1048576", "--config.accumulation_steps=1"]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [pytest.param("a100x4", [], marks=pytest.mark.slow), ("h100x512", MILLION)],
)
def test_full_scale_is_planned(mesh, overrides):
    config = "--config=configs/lit_cwcl.py:paper"
    result = run(config, f"--mesh={mesh}", "--nosearch", *overrides, timeout=600)
    assert result.returncode == DONE, result.stderr
    assert "device-hours" in result.stdout
