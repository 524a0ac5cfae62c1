"""The picture of a run's curves: what it says beside them."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from cwcl_jax.training.plots import plot_losses


def test_a_picture_says_which_side_is_which(tmp_path, monkeypatch):
    names = ("loss", "loss_u_to_v", "loss_v_to_u", "accuracy_u_to_v", "accuracy_v_to_u")
    rows = [{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    monkeypatch.setattr("os.replace", lambda *paths: None)
    plot_losses(
        tmp_path / "metrics.jsonl", tmp_path / "losses.png", name="my run",
        towers=("image", "text"), batch_size=64,
    )  # fmt: skip
    (figure,) = drawn
    assert figure.get_suptitle() == "my run"
    loss, excess, accuracy, _ = figure.axes
    assert [line.get_label() for line in loss.lines] == ["image to text", "text to image"]
    assert [line.get_label() for line in accuracy.lines][2] == "chance"
    assert list(accuracy.lines[2].get_ydata()) == [1 / 64] * 2
    assert all(tick == int(tick) for tick in loss.get_xticks())  # no half steps
    assert not excess.lines
