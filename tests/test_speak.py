"""The command that speaks sentences: a manifest with names of classes, its mistakes."""

import pytest

from cwcl_jax import speak
from cwcl_jax.data.sources import open_source

pytest.importorskip("espeakng_loader")
pytest.importorskip("soxr")


def test_the_command_writes_the_manifest_that_it_prints(tmp_path, capsys):
    lines = ["sentence\tintent", "turn on the light\ton", "\ton", "what time is it now\ttime"]
    (tmp_path / "s.tsv").write_text("\n".join(lines) + "\n")
    line = f"spoken:tsv:{tmp_path}/s.tsv?text=sentence&label=intent"
    out = str(tmp_path / "out")
    assert speak.main([line, out]) == 0
    manifest = capsys.readouterr().out.strip()
    made = open_source(f"jsonl:{manifest}")
    assert made.class_names == ["on", "time"]
    rows = [made.read(i, ("text", "label")) for i in range(len(made))]
    assert [row["text"] for row in rows] == ["turn on the light", "what time is it now"]
    assert [row["label"] for row in rows] == [0, 1]
    assert made.durations is not None
    assert all(0.3 < seconds < 3 for seconds in made.durations)
    for other, message in (
        (line + "&voices=en-us", "holds recordings of another source"),
        (line.removeprefix("spoken:"), "put spoken: before"),
        (line + "&voices=martian&keep=x", "no voice 'martian"),
    ):
        assert speak.main([other, out if "martian" not in other else f"{out}2"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
