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
        ({"u": np.ones((4, 2)), "v": np.ones((4, 2)), "logit_scale": [1.0, 2.0]}, "one finite"),
        ({"u": np.ones((4, 2)), "v": np.ones((4, 2)), "logit_scale": 100.0}, "1/tau itself"),
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
        ("--losses=cwcl,foo", "'foo' is not one of cwcl, contrastive, sigmoid, xclr"),
        ("--forms=foo", "'foo' is not one of pytorch, dense"),
        ("--dtypes=int8", "'int8' is not one of float64"),
        ("--sizes=256", "'256' is not N x d"),
        ("--inverse_temperatures=14.3,-1", "above 0"),
        ("--devices=1000", "--devices=1000: there are"),
        ("--devices=0", "'0' is not a whole number from 1 on"),
        ("--processes=1000", "--processes=1000: there are"),
        ("--processes=-1", "'-1' is not a whole number from 0 on"),
        ("--steps=-1", "'-1' is not a whole number from 0 on"),
        ("--embeds=absent.npz", "No such file or directory: 'absent.npz'"),
    ],
)
def test_mistakes_end_with_exit_code_2_and_name_the_option(option, message, capsys):
    assert compare_torch.main([option]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert option.split("=")[0] in said


def test_pytorch_alone_in_tf32_is_nothing_to_compare(capsys):
    assert compare_torch.main(["--forms=pytorch", "--dtypes=tf32", "--processes=0"]) == 2
    assert "nothing is left to compare" in capsys.readouterr().err


def test_pairs_that_are_told_apart_are_compared_by_their_terms():
    """Each pair equal, the others far: all that is left of a gradient is rounding."""
    u = compare_torch.unit_rows(np.random.default_rng(0).normal(size=(32, 64)))
    row = compare_torch.compare(
        "contrastive", "dense", "float32", dict.fromkeys("uvp", u), np.log(14.3), 1
    )
    assert row["value"] < 1e-3
    assert row["passed"], row
    wrong = compare_torch.errors((0.0, [2 * u, u, 1.0]), (0.0, [u, u, 1.0]), "float32", 2.5)
    assert not wrong["passed"]


def test_an_option_that_embeds_make_idle_is_refused(tmp_path, capsys):
    path = tmp_path / "embeds.npz"
    made = compare_torch.made_embeds(8, 4)
    np.savez(path, u=made["u"], v=made["v"], logit_scale=2.0)
    for option in ("--sizes=8x4", "--inverse_temperatures=10"):
        assert compare_torch.main([f"--embeds={path}", option]) == 2
        said = capsys.readouterr()
        assert option.split("=")[0] in said.err
        assert "has no p: the similarity weights come from u" in said.out


@pytest.mark.multiprocess
def test_several_pytorch_processes_agree_with_the_ring():
    row = compare_torch.several_processes("cwcl", compare_torch.made_embeds(32, 8), 2.0, 2)
    assert row["passed"]


def test_rows_that_do_not_split_evenly_are_left_out_and_told(tmp_path, capsys):
    path = tmp_path / "embeds.npz"
    np.savez(path, **compare_torch.made_embeds(33, 8), ids=np.array(["a"] * 33), logit_scale=[2.0])
    flags = [*SMALL[:3], "--steps=0", "--processes=0", f"--output={tmp_path}", f"--embeds={path}"]
    assert compare_torch.main(flags) == 0
    assert "the first 32 of 33 rows" in capsys.readouterr().out
    rows = json.loads((tmp_path / "compare_torch.json").read_text())["rows"]
    assert [(row["form"], row["n"]) for row in rows] == [("fused", 32), ("ring", 32)]
    assert {row["inverse_temperature"] for row in rows} == {round(float(np.exp(2.0)), 4)}


def test_too_few_rows_to_split_are_an_error(tmp_path, capsys):
    path = tmp_path / "embeds.npz"
    np.savez(path, **compare_torch.made_embeds(3, 8))
    assert compare_torch.main([f"--embeds={path}", "--devices=4"]) == 2
    assert "has 3 rows, fewer than the 4 that split evenly" in capsys.readouterr().err


def test_files_that_are_no_npz_are_named(tmp_path, capsys):
    np.save(tmp_path / "one.npy", np.ones((4, 2)))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04" + bytes(50))
    (tmp_path / "empty.npz").write_bytes(b"")
    for name, message in (
        ("one.npy", "save u and v with np.savez"),
        ("broken.npz", "is not a .npz file"),
        ("empty.npz", "is not a .npz file"),
    ):
        assert compare_torch.main([f"--embeds={tmp_path / name}"]) == 2
        assert message in capsys.readouterr().err


def test_a_file_as_output_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for output in ("file", "file/below"):
        assert compare_torch.main([f"--output={tmp_path / output}"]) == 2
        assert "file is a file; name a folder" in capsys.readouterr().err
