import json

import numpy as np
import pytest

from cwcl_jax import compare_torch

SMALL = ["--losses=cwcl", "--forms=fused,ring", "--dtypes=float32", "--sizes=32x8"]


def test_the_forms_agree_with_pytorch_and_the_report_is_written(tmp_path):
    out = tmp_path / "out"
    code = compare_torch.main(
        [*SMALL, "--inverse-temperatures=14.3", f"--output={out}", "--steps=20", "--processes=0"]
    )
    assert code == 0
    report = json.loads((out / "compare_torch.json").read_text())
    assert {row["form"] for row in report["rows"]} == {"fused", "ring"}
    assert all(row["passed"] for row in report["rows"])
    curve = report["training"]["cwcl"]
    np.testing.assert_allclose(curve["jax"], curve["pytorch"], rtol=1e-4)
    assert (out / "training.png").stat().st_size > 0
    assert "| cwcl | ring | float32 | 32 | 8 |" in (out / "compare_torch.md").read_text()


def test_an_exceeded_tolerance_gives_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setitem(compare_torch.TOLERANCES, "float32", (0.0, 0.0))
    path = tmp_path / "embeds.npz"
    made = compare_torch.made_embeds(32, 8)
    np.savez(path, u=3 * made["u"], v=made["v"], logit_scale=2.0)
    flags = ["--steps=0", "--processes=0", f"--output={tmp_path}", f"--embeds={path}"]
    assert compare_torch.main(["--losses=cwcl", "--forms=fused", "--dtypes=float32", *flags]) == 1


def test_a_file_without_embeds_is_an_error(tmp_path):
    np.savez(tmp_path / "x.npz", image=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"has no array \['u', 'v'\]; it has \['image'\]"):
        compare_torch.read_embeds(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"u": np.ones((4, 2)), "v": np.ones((3, 2))}, r"u \(4, 2\), v \(3, 2\)"),
        ({"u": np.ones((4, 2)), "v": np.ones((4, 2)), "p": np.ones((3, 5))}, r"p \(3, 5\)"),
        ({"u": np.ones((4, 2)), "v": np.eye(4)[:, :2]}, "row 2 of v is zero"),
        ({"u": np.full((4, 2), np.nan), "v": np.ones((4, 2))}, "row 0 of u is zero or not finite"),
    ],
)
def test_embeds_that_cannot_be_compared_are_errors(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        compare_torch.read_embeds(str(tmp_path / "x.npz"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--losses=cwcl,foo", "'foo' is none of cwcl, contrastive, sigmoid, astroclip"),
        ("--forms=foo", "'foo' is none of pytorch, dense"),
        ("--dtypes=int8", "'int8' is none of float64"),
        ("--sizes=256", "'256' is not N x d"),
        ("--inverse-temperatures=14.3,-1", "above 0"),
        ("--devices=1000", "--devices=1000: there are"),
        ("--embeds=absent.npz", "No such file or directory: 'absent.npz'"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_name_the_option(option, message, capsys):
    with pytest.raises(SystemExit) as ended:
        compare_torch.main([option])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert option.split("=")[0] in said


@pytest.mark.multiprocess
def test_several_pytorch_processes_agree_with_the_ring():
    row = compare_torch.several_processes("cwcl", compare_torch.made_embeds(32, 8), 2.0, 2)
    assert row["passed"]
