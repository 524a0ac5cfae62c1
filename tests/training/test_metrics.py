"""Records and the progress line."""

import io
import math
from pathlib import Path

import pytest

from cwcl_jax.training.metrics import (
    JsonLines,
    Progress,
    duration,
    progress_line,
    read_json_lines,
    truncate_json_lines,
)


def test_records_survive_a_torn_last_line_and_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    truncate_json_lines(path, after_step=2)
    assert read_json_lines(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_a_full_disk_at_a_resume_leaves_the_records(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    for step in range(1, 101):
        writer.write(step, {"loss": 1.0})
    writer.close()

    def write_until_full(self, text, **options):
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        truncate_json_lines(path, after_step=100)
    assert len(read_json_lines(path)) == 100


def test_non_finite_values_are_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path)
    writer.write(1, {"loss": math.nan})
    writer.close()
    assert read_json_lines(path) == [{"step": 1, "loss": None}]


def test_progress_prints_lines_now_and_then_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(100, stream=stream, seconds_between_lines=1000.0)
    for step in (1, 2, 100):
        progress.show(step, {"loss": 1.0}, eta_seconds=3.0)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "100/100"]


def test_progress_line_shows_what_a_person_watches():
    values = {
        "loss": 9.1234,
        "loss_u_to_v": 4.0,
        "loss_v_to_u": 5.1234,
        "excess": 0.25,
        "effective_positives": 12.3,
        "examples_per_second": 812.4,
        "seconds_per_step": 0.315,
        "mfu": 0.4123,
        "memory_gb": 61.26,
        "data_wait": 0.031,
        "gradient_norm/image": 0.25,
        "gradient_norm/text": 12.3,
        "validation/loss": 8.5,
    }
    line = progress_line(20, 400, values, eta_seconds=83.0)
    for part in (
        "step  20/400",
        "loss 9.123",
        "excess 0.250",
        "eff.pos 12.3",
        "pairs/s 812",
        "s/step 0.315",
        "MFU 41.2%",
        "GB 61.3",
        "3%",
        "eta 1:23",
        "grad image 0.25 text 12",
        "held-out 8.500",
    ):
        assert part in line


def test_duration():
    assert [duration(s) for s in (5.0, 65.0, 3725.0, math.inf)] == ["0:05", "1:05", "1:02:05", "?"]
