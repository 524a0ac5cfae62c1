"""The bytes of a step that are computed on paper are those of the compiled program."""

import pytest

from cwcl_jax.benchmarks import step
from cwcl_jax.benchmarks.harness import markdown


@pytest.mark.parametrize("form", step.FORMS)
def test_formula_gives_the_bytes_of_the_program(form):
    # Four devices of this process stand for four processes: the program is the same.
    row = step.measure({"form": form, "examples": 16, "steps": 2})
    assert row["devices"] == 4
    # The formula leaves out the metrics' few sums over the batch.
    assert row["sent_total"] == pytest.approx(row["formula_total"], rel=0.01)
    assert row["seconds"] > 0


def test_one_device_sends_nothing():
    assert step.formula(64, 1, 8, 8, 100) == {"gathered": {}, "ring": {}}


def test_volumes_of_the_paper():
    rows = step.on_paper()
    assert [row["devices"] for row in rows] == [8] * 2 + [64] * 4 + [512] * 4  # 8 x 2,048 = 16,384
    # The gathered loss of a fixed batch does not grow with the devices; a batch that grows with
    # them makes the loss's part grow too, and the gradients' stay.
    fixed = [r for r in rows if r["batch"] == 16_384 and r["form"] == "gathered"]
    assert fixed[-1]["loss_mb"] / fixed[0]["loss_mb"] == pytest.approx(511 / 512 / (7 / 8))
    grown = [r for r in rows if r["batch"] == 2_048 * r["devices"] and r["form"] == "ring"]
    # But for the ring's last hop of d + 4 values, of which each device sends its own rows.
    hops = [3 * 1024 + 6 + (1024 + 4) / devices for devices in (512, 8)]
    assert grown[-1]["loss_mb"] / grown[0]["loss_mb"] == pytest.approx(64 * hops[0] / hops[1])


def test_tables_are_markdown():
    text = markdown([{"form": "ring", "sent_bytes": {"all-reduce": 1234}}], step.MEASURED)
    assert "all-reduce 1,234" in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--processes=1,x", "not a list of whole numbers"),
        ("--forms=star", "not one of gathered, ring"),
        ("--steps=1", "'1' is not a whole number from 2 on"),
        ("--devices=0", "'0' is not a whole number from 1 on"),
        ("--examples=-1", "'-1' is not a whole number from 1 on"),
    ],
)
def test_mistakes_end_with_exit_code_2_before_anything_runs(option, message, capsys):
    assert step.main([option]) == 2
    assert message in capsys.readouterr().err
