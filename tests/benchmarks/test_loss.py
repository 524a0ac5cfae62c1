import json

import pytest

from cwcl_jax.benchmarks import loss


@pytest.mark.slow
@pytest.mark.multiprocess
def test_every_measurement_is_written_down(tmp_path):
    """Slow: a benchmark in fresh processes."""
    flags = ["--sizes=64x8", "--forms=fused cwcl;dense torch cwcl", "--seconds=0"]
    code = loss.main([*flags, f"--output={tmp_path}", "--dense-gb=0.00001"])
    assert code == 0
    rows = json.loads((tmp_path / "loss.json").read_text())["losses"]
    assert [row["form"] for row in rows] == ["fused cwcl", "dense torch cwcl"]
    assert rows[0]["seconds"] > 0
    assert rows[0]["of_matmul_rate"] > 0
    assert rows[1]["failed"].startswith("left out")
    # The closed form's products beside contrastive's: 1 + k / N.
    assert rows[0]["products"] == pytest.approx(1 + 8 / 64, rel=0.02)


def test_pytorch_is_measured_alike(monkeypatch):
    """Beside less than the product of 4096 x 4096 that takes seconds."""
    calls = loss.torch_call
    monkeypatch.setattr(loss, "torch_call", lambda *job: (calls(*job)[0], lambda: sum(range(999))))
    job = {"form": "dense torch cwcl", "n": 64, "d": 8, "dtype": "float32", "seconds": 0}
    row = loss.measure(job)
    assert row["seconds"] > 0
    assert row["of_matmul_rate"] > 0


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


def test_memory_is_drawn_where_it_was_measured(tmp_path):
    row = {"form": "fused cwcl", "n": 64, "d": 8, "dtype": "float32"}
    measured = [row | {"extra_mb": 0.0}, row | {"n": 128, "extra_mb": 2.0}]
    failed = row | {"form": "dense torch cwcl", "failed": "left out"}
    loss.plot_memory([*measured, failed], tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    loss.plot_memory([failed], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


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
