"""Every command of the README is run by a test, or the README lists it as not run.

A command is what stands in an indented block or between backticks and begins with `python`,
`launch/` or `sbatch`. RUN_BY names the test that runs the same program with the same kind of
options. All others stand in the README's section "Commands that no test runs", one a line:

    - `COMMAND`: why

Options and config files that a command names must exist, whether or not it is run.
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
NOT_RUN = "## Commands that no test runs"

# Test -> full matches on commands without their comments.
RUN_BY = {
    "tests/test_train.py::test_short_default_run_with_overrides": [
        r"python -m cwcl_jax\.train --config=FILE.*",
        r"python -m cwcl_jax\.train --config=configs/(lit_cwcl|scenes_pretrain)\.py"
        r"(:loss=contrastive)?( --workdir=\S+)?",
    ],
    "tests/test_train.py::test_paper_recipe_without_its_data_names_path_and_option": [
        r"python -m cwcl_jax\.train --config=configs/lit_cwcl\.py:paper(,text=bert)?",
    ],
    "tests/test_embed.py::"
    "test_training_from_embeddings_gives_the_losses_of_training_from_pictures": [
        r"python -m cwcl_jax\.train .*embeds=embeds.*",
    ],
    "tests/test_embed.py::test_vectors_are_the_features_of_the_tower": [
        r"python -m cwcl_jax\.embed .*",
    ],
    "tests/training/test_distributed.py::test_two_processes_give_the_losses_of_one": [
        r"python launch/local\.py -n \d -d \d -- python -m cwcl_jax\.train .*",
    ],
    "tests/test_export.py::test_command_line_exports_and_reports_errors_in_one_line": [
        r"python -m cwcl_jax\.export .*",
    ],
    "tests/test_evaluate.py::test_all_tasks_of_a_run_are_evaluated_and_written": [
        r"python -m cwcl_jax\.evaluate --workdir=\S+",
    ],
    "tests/test_evaluate.py::test_tasks_are_chosen_by_name_or_given_in_a_file": [
        r"python -m cwcl_jax\.evaluate --workdir=\S+ --tasks=\S+",
    ],
    "tests/test_evaluate.py::test_second_run_is_compared_with_the_first": [
        r"python -m cwcl_jax\.evaluate .*--compare=\S+.*",
    ],
    "tests/test_evaluate.py::test_imported_model_is_evaluated_without_a_run": [
        r"python -m cwcl_jax\.evaluate --config=.*",
    ],
    "tests/test_evaluate.py::test_picture_is_classified_from_typed_classes": [
        r"python -m cwcl_jax\.evaluate .*--(image|audio)=.*",
    ],
    "tests/test_compare_torch.py::test_the_forms_agree_with_pytorch_and_the_report_is_written": [
        r"python -m cwcl_jax\.compare_torch.*",
    ],
    "tests/benchmarks/test_loss.py::test_every_measurement_is_written_down": [
        r"python -m cwcl_jax\.benchmarks\.loss.*",
    ],
    "tests/benchmarks/test_heads.py::test_heads_train_and_are_evaluated_on_kept_features": [
        r"python -m cwcl_jax\.benchmarks\.heads .*",
    ],
    "tests/benchmarks/test_input.py::test_rates_are_measured_on_real_batches": [
        r"python -m cwcl_jax\.benchmarks\.input.*",
    ],
    "tests/data/test_spoken.py::test_the_command_writes_the_manifest_that_it_prints": [
        r"python -m cwcl_jax\.data\.rendering .*",
    ],
    "tests/test_plan.py::test_command_prints_the_whole_plan": [r"python -m cwcl_jax\.plan .*"],
    "tests/test_reproduce.py::test_paper_scale_prints_the_commands": [
        r"python -m cwcl_jax\.reproduce .*--scale=paper.*",
    ],
    "tests/test_reproduce.py::test_command_makes_runs_and_page": [
        r"python -m cwcl_jax\.reproduce .*",
    ],
    "tests/test_configs.py::test_takes_a_step_at_toy_size": [
        r"python -m cwcl_jax\.train --config=configs/(lit|features|speech)_cwcl\.py\S*"
        r"( --workdir=\S+)?",
    ],
}


def covering(command: str) -> list[str]:
    return [
        test
        for test, patterns in RUN_BY.items()
        if any(re.fullmatch(pattern, command) for pattern in patterns)
    ]


def commands() -> list[str]:
    """The README's commands, without comments; those that only prepare an environment count too."""
    body = re.sub(r"\\\n\s*", "", README.split(NOT_RUN)[0])
    lines = [line.strip() for line in body.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`((?:python|sbatch|launch/)[^`]*)`", body)
    lines += [
        f"python -m cwcl_jax.train {c}" for c in re.findall(r"^\| `(--config=[^`]*)`", body, re.M)
    ]
    found = [re.sub(r"\s+#.*$", "", line) for line in lines]
    start = re.compile(r"(python3?|sbatch|gcloud|kubectl|launch/\S+\.\w+) \S")
    return list(dict.fromkeys(line for line in found if start.match(line)))


def listed_as_not_run() -> list[str]:
    section = README.split(NOT_RUN)[1] if NOT_RUN in README else ""
    return re.findall(r"^- `([^`]*)`", section.split("\n## ")[0], re.M)


def test_there_are_commands():
    assert len(commands()) > 15


@pytest.mark.parametrize("command", commands())
def test_command_is_run_by_a_test_or_listed_as_not_run(command):
    if command in listed_as_not_run():
        return
    # The first lines make an environment; what they run in it is what counts.
    last = command.split(" && ")[-1]
    last = re.sub(r"^\.venv(-test)?/bin/", "", last)
    if last == "pytest -n 2":
        return
    tests = covering(last)
    assert tests, f"add it to RUN_BY here, or to the README under {NOT_RUN!r} as - `{command}`: why"
    for test in tests:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("command", [c for c in commands() if "cwcl_jax." in c])
def test_every_option_of_a_command_exists(command, tmp_path, monkeypatch):
    rows = np.zeros((4, 8), np.float32)
    np.savez(tmp_path / "features.npz", profile=rows, compound=rows)
    monkeypatch.chdir(tmp_path)
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


def test_what_is_listed_as_not_run_is_not_run():
    for command in listed_as_not_run():
        assert not covering(command), command
