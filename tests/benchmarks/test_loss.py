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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--sizes=1024", "'1024' is not N x d"),
        ("--forms=fused cwcl;star", "'star' is none of fused cwcl; fused cwcl, u constant;"),
        ("--dtypes=int8", "'int8' is none of float32"),
    ],
)
def test_mistakes_end_with_exit_code_2_before_anything_runs(option, message, capsys):
    assert loss.main([option]) == 2
    assert message in capsys.readouterr().err
