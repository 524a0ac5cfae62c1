"""Numbers over seeds, verdicts, pages; the definitions of all experiments."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cwcl_jax.config import ConfigError
from cwcl_jax.evaluation.significance import seed_interval
from cwcl_jax.reproduction import experiments, page
from cwcl_jax.reproduction.experiments import Cell, Experiment, Scale
from cwcl_jax.reproduction.figures import _spread_out
from cwcl_jax.reproduction.measures import Spread, difference, measure, recorded, verdict
from cwcl_jax.reproduction.paper import TABLES
from cwcl_jax.reproduction.runs import Run, load_experiment


def write_items(folder, task, **arrays):
    (folder / "items").mkdir(parents=True, exist_ok=True)
    np.savez(folder / "items" / f"{task}.npz", **arrays)


def test_shares_come_from_ranks(tmp_path):
    write_items(tmp_path, "shape", rank=np.asarray([1, 2, 1, 7]), rank_k1=np.asarray([3, 3, 1, 1]))
    assert measure(tmp_path, "shape", "rank@1") == 50
    assert measure(tmp_path, "shape", "rank@5") == 75
    assert measure(tmp_path, "shape", "rank_k1@1") == 50
    with pytest.raises(ValueError, match="no 'rank_k9'"):
        measure(tmp_path, "shape", "rank_k9@1")
    with pytest.raises(ValueError, match="no results of the task 'colour'"):
        measure(tmp_path, "colour", "rank@1")


def test_block_diagonality_is_within_minus_between(tmp_path):
    matrix = np.asarray([[1.0, 0.5], [0.1, 0.9]])
    write_items(tmp_path, "alignment", matrix=matrix, matrix_classes=np.asarray(["a", "b"]))
    assert measure(tmp_path, "alignment", "block_diagonality") == pytest.approx(65)


def test_the_record_of_all_runs_keeps_what_each_measured_under_its_prompts(tmp_path):
    for name, share in (("cl-seed0", 0.25), ("cl-seed1", 0.5)):
        records = [
            {"name": "intent", "prompts": "dataset", "metrics": {"acc1": share}},
            {"name": "intent", "prompts": "general", "metrics": {"acc1": share / 2}},
            {"name": "retrieval", "metrics": {"text_retrieval_recall@1": 1 / 3}},
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(records))
    made = recorded([tmp_path / "cl-seed0", tmp_path / "cl-seed1"])
    assert list(made) == ["cl-seed0", "cl-seed1"]
    assert made["cl-seed1"] == {
        "intent | dataset": {"acc1": 0.5},
        "intent | general": {"acc1": 0.25},
        "retrieval": {"text_retrieval_recall@1": 0.333333},
    }


def test_intervals_are_students_over_seeds():
    values = (10.0, 12.0, 14.0)
    assert Spread(values).interval == seed_interval(values)[1]
    assert str(Spread(values)) == "12.00 ± 4.97"
    assert str(Spread((3.0,))) == "3.00"


def test_verdicts_follow_the_interval_of_paired_differences():
    low, noisy = Spread((10.0, 20.0, 30.0)), Spread((11.0, 21.1, 30.9))
    assert verdict(difference(low, noisy)) == "higher"
    assert verdict(difference(noisy, low)) == "lower"
    assert verdict(Spread((-1.0, 1.0, 0.5))) == "no difference shown"
    assert "no conclusion" in verdict(Spread((5.0,)))


def test_seeds_that_agree_to_the_item_have_no_interval():
    """61 - 55 and 62 - 56 of 700 items differ in the last bit of a double, and by chance agree."""
    a, b = Spread((100 * 55 / 700, 100 * 56 / 700)), Spread((100 * 61 / 700, 100 * 62 / 700))
    change = difference(a, b)
    assert change.interval is None
    assert "no interval" in verdict(change)
    assert str(change) == "0.86"
    assert difference(a, Spread((9.0, 13.0))).interval is not None
    text = page.table_section(*two_by_one(a.values, b.values), (0, 1))
    assert "higher than CL in 0 of 1" in text
    assert "in 1 the seeds show no difference" in text


def two_by_one(cl, cwcl):
    run = Run("x", "configs/lit_cwcl.py")
    cells = (Cell(run, "t", "rank@1"),)
    experiment = Experiment("Title", 4, ("R@1",), {"CL": cells, "CWCL": cells}, "About.")
    return experiment, {"CL": [Spread(cl)], "CWCL": [Spread(cwcl)]}


def test_the_page_says_that_cwcl_does_not_win():
    text = page.table_section(*two_by_one((50.0, 51.0, 52.0), (40.0, 41.2, 42.1)), (0, 1, 2))
    assert "lower in 1" in text
    assert "gain is not reproduced" in text
    assert "| CWCL | 35.10 |" in text  # the paper's, beside
    assert "-9.90" in text


def test_the_page_says_that_cwcl_wins():
    text = page.table_section(*two_by_one((40.0, 41.0, 42.0), (50.0, 51.2, 52.1)), (0, 1, 2))
    assert "higher than CL in 1 of 1" in text
    assert "not reproduced" not in text


def test_what_cannot_differ_is_named():
    text = page.table_section(*two_by_one((100.0, 100.0), (100.0, 100.0)), (0, 1))
    assert "as at 100 %: R@1" in text


def test_one_seed_allows_no_conclusion():
    text = page.table_section(*two_by_one((40.0,), (90.0,)), (0,))
    assert "no conclusion" in text
    assert "±" not in text


@pytest.mark.parametrize("number", [4, 5, 6, 7, 8])
def test_every_table_is_defined_and_has_the_papers_beside(number):
    made = experiments.table(number, Scale(steps=3))
    assert made.paper == number
    assert {"CL", "CWCL"} <= set(made.rows)
    for row in made.rows.values():
        assert len(row) == len(made.columns)
    for row in TABLES[number].rows.values():
        assert len(row) == len(TABLES[number].columns)
    for run in made.runs:
        assert any(option.startswith("--config.total_steps=") for option in run.options)


def test_runs_of_equal_names_are_equal():
    scale = Scale()
    made = [experiments.table(n, scale) for n in (4, 5, 6, 7, 8)]
    made += [experiments.ablation(kind, scale) for kind in ("weights", "speech_weights", "batch")]
    runs = {run for experiment in made for run in experiment.runs}
    runs |= set(experiments.aligned_runs(scale).values())
    assert len({run.name for run in runs}) == len(runs)


def test_what_two_tables_show_is_trained_once():
    five, six, seven, eight = (set(experiments.table(n, Scale()).runs) for n in (5, 6, 7, 8))
    assert not five & six  # which has fewer steps
    assert {run.after for run in six} == {run.after for run in five} - {None}
    assert len(five & seven) == len(five & eight) == 2  # from scratch at the config's batch
    assert len(six) == 8
    assert len(seven) == 6
    compared = set(experiments.ablation("speech_weights", Scale()).runs)
    assert set(experiments.aligned_runs(Scale()).values()) <= compared


def test_batches_keep_the_number_of_examples_also_of_the_warm_up():
    scale = Scale(steps=100)
    made = experiments.ablation("batch", scale)
    own = load_experiment(experiments.SCENES)
    products = set()
    for run in made.runs:
        options = dict(option.split("=") for option in run.options)
        size = int(options.get("--config.global_batch_size", own.global_batch_size))
        warmup = options.get("--config.optimizer.warmup_steps", own.optimizer.warmup_steps)
        products.add((size * int(options["--config.total_steps"]), size * int(warmup)))
    assert len(products) == 1
    # The default batch is no run of its own.
    assert set(experiments.scene_runs(scale).values()) < set(made.runs)


def test_what_a_table_varies_wins_over_the_command_line():
    made = experiments.table(7, Scale(speech="batch=64,weights=relu2"))
    for row in (made.rows["CL"], made.rows["CWCL"]):
        configs = [load_experiment(cell.run.file, cell.run.argument) for cell in row]
        assert [config.global_batch_size for config in configs] == [32, 64, 128]
    losses = [
        load_experiment(row[0].run.file, row[0].run.argument).loss for row in made.rows.values()
    ]
    assert [loss.name for loss in losses] == ["contrastive", "cwcl"]
    assert losses[1].weight_function == "relu2"


def test_what_rows_leave_to_the_config_cannot_be_set():
    with pytest.raises(ConfigError, match="--scenes=loss=cellclip: every table compares"):
        Scale(scenes="loss=cellclip")
    with pytest.raises(ConfigError, match="--speech=init=x: Table 5"):
        experiments.table(5, Scale(speech="init=x"))
    with pytest.raises(ConfigError, match="--speech=lock=speech: Table 6"):
        experiments.table(6, Scale(speech="lock=speech"))
    scale = Scale(speech="projection=none")
    with pytest.raises(ConfigError, match="leave projection=none out"):
        experiments.check(experiments.needs([experiments.table(6, scale)], (), scale), scale)
    with pytest.raises(ConfigError, match="--scenes=weights=relu2: the ablation compares"):
        experiments.ablation("weights", Scale(scenes="weights=relu2"))
    with pytest.raises(ConfigError, match="leave weights out"):
        experiments.ablation("speech_weights", Scale(speech="batch=64,weights=relu2"))


def test_unknown_tables_are_errors():
    with pytest.raises(ConfigError, match="--table=3: choose one of 4"):
        experiments.table(3, Scale())
    with pytest.raises(ConfigError, match="choose one of weights, speech_weights, batch"):
        experiments.ablation("seed", Scale())


def test_others_run_from_the_most_to_the_least_similar():
    cosines = np.linspace(1, -1, 50)
    chosen = _spread_out(cosines, 0, 9)
    assert chosen[:3] == [1, 2, 3]
    assert chosen[-1] == 49
    assert chosen == sorted(chosen)


@pytest.mark.parametrize(
    ("tables", "figures", "given", "said"),
    [
        ([4], [7], {"speech": "bogus=1"}, "--speech=bogus=1: .*no field 'bogus'"),
        ([], [7], {"speech": "head"}, "--speech=head: head needs init="),
        ([], [7], {"speech": "data=/nowhere"}, "these settings have no task 'alignment'"),
        ([4], [], {"speech": "projection=trained"}, "no table or figure of this command has such"),
        ([5], [8], {"scenes": "projection=trained"}, "no table or figure of this command has such"),
    ],
)
def test_settings_are_checked_before_the_first_run(tables, figures, given, said):
    scale = Scale(**given)
    wanted = [experiments.table(number, scale) for number in tables]
    with pytest.raises(ConfigError, match=said):
        experiments.check(experiments.needs(wanted, figures, scale), scale)


def test_what_all_tables_and_figures_read_exists():
    scale = Scale(scenes="projection=trained", speech="projection=trained")
    wanted = [experiments.table(number, scale) for number in (4, 5, 6, 7, 8)]
    wanted += [experiments.ablation(kind, scale) for kind in ("weights", "speech_weights", "batch")]
    needed = experiments.needs(wanted, (5, 6, 7, 8), scale)
    experiments.check(needed, scale)
    assert {run for experiment in wanted for run in experiment.runs} == set(needed)


def test_what_is_locked_does_not_concern_the_pretraining():
    made = experiments.pretrained_speech(Scale(speech="lock=both"))
    assert load_experiment(made.file, made.argument).towers["speech"].tune == "all"
    with pytest.raises(ConfigError, match="leave paper out"):
        Scale(speech="paper")
