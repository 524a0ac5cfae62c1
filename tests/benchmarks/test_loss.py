import json

import pytest

from cwcl_jax.benchmarks import loss


@pytest.mark.multiprocess
def test_every_measurement_is_written_down(tmp_path):
    flags = ["--sizes=64x8,128x8", "--forms=fused cwcl;dense torch cwcl", "--seconds=0"]
    code = loss.main([*flags, f"--output={tmp_path}", "--dense-gb=0.0002"])
    assert code == 0
    rows = json.loads((tmp_path / "loss.json").read_text())["losses"]
    assert [row["form"] for row in rows] == ["fused cwcl", "dense torch cwcl"] * 2
    assert all(rows[i]["seconds"] > 0 and rows[i]["of_matmul_rate"] > 0 for i in (0, 1, 2))
    assert rows[3]["failed"].startswith("left out")
    # The closed form's products beside contrastive's: 1 + k / N.
    assert rows[0]["products"] == pytest.approx(1 + 8 / 64, rel=0.02)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sizes=1024", "'1024' is not N x d"),
        ("--forms=fused cwcl;star", "'star' is not one of fused cwcl; fused cwcl, u constant;"),
        ("--dtypes=int8", "'int8' is not one of float32"),
    ],
)
def test_mistakes_end_with_exit_code_2_before_anything_runs(option, message, capsys):
    assert loss.main([option]) == 2
    assert message in capsys.readouterr().err


def test_times_stand_over_contrastive_of_the_same_size():
    def row(form, n, seconds):
        return {"form": form, "n": n, "d": 8, "dtype": "float32"} | (
            {"seconds": seconds, "cpu_seconds": 2 * seconds} if seconds else {"failed": "no"}
        )

    rows = []
    for made in (
        row("fused contrastive", 64, 2.0),
        row("fused gist", 64, 3.0),
        row("fused gist", 128, 3.0),
        row("fused s2l", 64, None),
    ):
        rows.append(made)
        loss._compare(rows)
    found = [made.get("over_contrastive") for made in rows]
    assert found == [1.0, 1.5, None, None]
    assert loss.PRESET_FORMS[0] == "fused contrastive"
