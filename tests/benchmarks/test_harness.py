"""Rounds in turns, medians beside a baseline, short tables, failures that are named."""

import json

from cwcl_jax.benchmarks import harness
from cwcl_jax.benchmarks.harness import Rate


def test_cells_are_short_and_a_missing_one_is_empty():
    rows = [{"a": 0.12345, "b": 12345, "c": True}, {"a": 12345.6, "c": {"x": 1000}}]
    lines = harness.markdown(rows, ["a", "b", "c"]).splitlines()
    assert lines[2:] == ["| 0.123 | 12,345 | True |", "| 12,346 |  | x 1,000 |"]


def test_cases_take_turns_until_rounds_and_time_are_over():
    called = []
    found = harness.interleaved({name: lambda n=name: called.append(n) for name in "ab"}, rounds=3)
    assert called == list("ababab")
    assert len(found["a"]) == 3
    again = harness.interleaved({"a": lambda: 1}, seconds=0.01)
    assert len(again["a"]) > 3


def test_every_thread_takes_its_own_numbers():
    numbers = []
    rate = harness.rate(lambda n: numbers.append(n) or 5, seconds=0.0, threads=3)
    assert sorted(numbers) == [0, 1, 2]
    assert rate.per_second > 0


def test_ratios_are_medians_of_the_same_round():
    found = {"slow": [Rate(10, 4), Rate(1, 4), Rate(30, 4)], "fast": [Rate(20, 2)] * 3}
    slow, fast = harness.rate_rows(found, "fast")
    assert (slow["per_second"], slow["ratio"], slow["cpu_ratio"]) == (10, 0.5, 2)
    assert (fast["ratio"], fast["cpu_ratio"]) == (1, 1)


def test_the_report_is_a_table_and_its_json(tmp_path, capsys):
    tables = {"rates": [{"source": "a", "ratio": 0.5, "rounds": [1]}]}
    harness.report(tmp_path / "new", "x", tables, {"rates": ["source", "ratio"]})
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == tables
    assert "| a | 0.5 |" in (tmp_path / "new" / "x.md").read_text() in capsys.readouterr().out


def test_a_failed_measurement_is_named_and_one_left_out_is_none():
    row = harness.run_fresh("cwcl_jax.benchmarks.loss", {"form": "fused cwcl"}, 60)
    assert "KeyError" in row["failed"]
    assert harness.code_of([row]) == 1
    assert harness.code_of([{"failed": "left out: too large"}, {"seconds": 1}]) == 0
    late = harness.run_fresh("cwcl_jax.benchmarks.loss", {"form": "x"}, 0.01)
    assert late["failed"] == "no result after 0 s"
