"""A task of the user's own, in a folder of theirs: configured, checked, trained, evaluated."""

import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from cwcl_jax import evaluate
from cwcl_jax.cli import DONE
from cwcl_jax.config import ConfigError, defaults
from cwcl_jax.evaluation.report import terminal_report
from cwcl_jax.evaluation.runner import run_task
from cwcl_jax.evaluation.tasks.base import Task, task_class
from cwcl_jax.training.evaluator import Evaluator
from cwcl_jax.training.run import train
from tests.evaluation.analytic import DATA, Analytic, Memory, give_sources
from tests.training.toy import toy_config

ROOT = Path(__file__).parents[3]
# The documented one, as a person would copy it.
README = (ROOT / "cwcl_jax/evaluation/README.md").read_text(encoding="utf-8")
MODULE = textwrap.dedent(re.findall(r'^    """Rank:.*\n(?:    .*\n|\n)+', README, re.M)[0])
SOURCE = "scenes:test?task=retrieval&n=24"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the user's, where Python finds its modules."""
    (tmp_path / "mytask.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mytask", None)


def test_own_numbers_stand_in_the_table(folder, monkeypatch):
    """Items 0 and 1 have their captions first, item 2 has it last: (1 + 1 + 1/3) / 3."""
    words = dict(zip(("circle", "square", "star"), np.eye(3), strict=True))
    table = np.zeros((256, 3))
    table[:3] = [[1, 0, 0], [0, 1, 0], [0.9, 0.8, 0.1]]
    give_sources(monkeypatch, x=Memory([0, 1, 2], texts=["circle", "square", "star"]))
    task = task_class("mytask:Rank")(source="memory:x", bootstrap=0)
    result = run_task("own", task, encode=Analytic(table, words), data=DATA, batch_size=4)
    assert result.metrics == {"reciprocal_rank": pytest.approx(7 / 9)}
    assert result.seconds["encode"] > 0
    (row,) = [line for line in terminal_report([result]).splitlines() if line.startswith("own ")]
    assert row.split() == ["own", "mytask:Rank", "reciprocal_rank", "0.7778"]


def test_own_task_is_run_by_train_and_by_evaluate(folder):
    """The numbers are those that the ranks of the retrieval task on the same items give.

    `evaluate` knows the task from the run's settings alone: nothing has imported its module.
    """
    tasks = ConfigDict()
    tasks.rank = defaults(Task, kind="mytask:Rank", source=SOURCE)
    tasks.rank.limit = 5  # as --config.evaluation.tasks.rank.limit=5
    tasks.pairs = defaults(Task, kind="retrieval", source=SOURCE)
    settings = {"total_steps": 1, "evaluation.tasks": tasks.to_dict()}
    assert train(toy_config(**settings), folder / "run") == DONE
    sys.modules.pop("mytask")
    assert evaluate.main(["--workdir=run"]) == DONE
    for results in (folder / "run", folder / "run" / "evaluation"):
        with np.load(results / "items" / "pairs.npz") as pairs:
            ranks = pairs["image_to_text_rank"]
        expected = np.mean(np.where(ranks <= 5, 1 / ranks, 0))
        records = json.loads((results / "results.json").read_text())
        (record,) = [record for record in records if record["name"] == "rank"]
        assert record["metrics"] == {"reciprocal_rank": pytest.approx(expected)}
        assert record["task"] == "mytask:Rank"
        assert "| rank | mytask:Rank | reciprocal_rank |" in (results / "results.md").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"limt": 3},
            r"tasks\.own has no field 'limt'; did you mean 'limit'\? \(or: [a-z_]+, [a-z_]+\)$",
        ),
        ({"limit": "many"}, r"tasks\.own\.limit must be int, got 'many'"),
        ({"kind": "mytask:Rang"}, r"tasks\.own: .*the module 'mytask' has no 'Rang'"),
        ({"kind": "myjob:Rank"}, r"tasks\.own: .*there is no module 'myjob'; start Python in"),
        ({"kind": "mytask:"}, r"tasks\.own: .*'mytask:' must have the form 'module:name'"),
        ({"kind": "mytask:TaskResult"}, r"tasks\.own: .*does not name a class that derives from"),
        ({"kind": "bare:Bare"}, r"tasks\.own: .*decorate the class with @dataclass"),
        ({"kind": "bare:NoRun"}, r"tasks\.own: .*abstract.*run"),
        ({"kind": "bare:Odd", "pick": "a"}, r"tasks\.own\.pick is annotated typing\.Literal"),
        ({"kind": "bare:Absent", "pick": "a"}, r"tasks\.own: an annotation of Absent has no type"),
        ({"recall_k": (1,)}, r"tasks\.own: a mytask:Rank task has no field 'recall_k'"),
    ],
)
def test_mistakes_in_own_tasks_are_told_before_training(folder, fields, message):
    (folder / "bare.py").write_text(
        "import typing\nfrom dataclasses import dataclass\n"
        "from cwcl_jax.evaluation.tasks.base import Task\n"
        "class Bare(Task):\n    limit: int = 3\n"
        "@dataclass(frozen=True)\nclass NoRun(Task):\n    limit: int = 3\n"
        "@dataclass(frozen=True)\nclass Odd(Task):\n    pick: typing.Literal['a', 'b'] = 'a'\n"
        "@dataclass(frozen=True)\nclass Absent(Task):\n    pick: 'Nowhere' = 'a'\n"
    )
    sys.modules.pop("bare", None)
    task = {"kind": "mytask:Rank", "source": SOURCE, **fields}
    with pytest.raises(ConfigError, match=r"config\.evaluation\." + message):
        toy_config(**{"evaluation.tasks": {"own": task}})


def test_own_check_is_asked_at_the_start(folder):
    task = {"kind": "mytask:Rank", "source": SOURCE}
    for fields, message in (
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"text_tower": "caption"}, "no 'caption' tower for this mytask:Rank task"),
        ({"source": "folder:/nowhere"}, "source='folder:/nowhere'"),
    ):
        config = toy_config(**{"evaluation.tasks": {"own": task | fields}})
        with pytest.raises(ConfigError, match=rf"evaluation\.tasks\.own: .*{message}"):
            Evaluator(config, folder).check_sources()


def test_a_run_that_gives_no_result_is_told(folder, monkeypatch):
    monkeypatch.setattr(task_class("mytask:Rank"), "run", lambda task, name, runner: {"a": 1.0})
    task = task_class("mytask:Rank")(source="memory:x")
    with pytest.raises(ValueError, match=r"task 'own': run\(\) of a mytask:Rank task returned"):
        run_task("own", task, encode=Analytic(np.zeros((256, 3)), {}), data=DATA)
