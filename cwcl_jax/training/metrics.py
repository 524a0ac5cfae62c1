"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases and the terminal."""

from __future__ import annotations

import json
import math
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cwcl_jax.config import ExperimentConfig, to_plain
from cwcl_jax.training.workdir import write_text


@runtime_checkable
class Writer(Protocol):
    """A sink of scalars."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line in `metrics.jsonl`; the record that plots are made from."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN; null is what every reader understands.
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; a line torn by a kill is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def truncate_json_lines(path: Path, after_step: int) -> None:
    """Drops the records after `after_step`: a resumed run writes them again."""
    if path.exists():
        records = [record for record in read_json_lines(path) if record["step"] <= after_step]
        # Whole or not at all: on a full disk the old records must stay.
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))


class TensorBoard:
    """TensorBoard event files; what earlier starts wrote after `start_step` is hidden."""

    def __init__(self, directory: Path, start_step: int):
        from tensorboardX import SummaryWriter

        # It hides its purge step too. Files are named after the second of their start: without the
        # step a second one of the same second would replace the first.
        self._writer = SummaryWriter(
            str(directory), purge_step=start_step + 1, filename_suffix=f".{start_step:012d}"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; the folder keeps its id, by which later starts go on with it."""

    def __init__(self, project: str, workdir: Path, config: ExperimentConfig):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "config.logging.wandb_project is set but wandb is not installed; "
                "pip install 'cwcl_jax[wandb]' or unset it"
            ) from error
        self._run = wandb.init(
            project=project,
            id=_wandb_id(workdir),
            name=workdir.name,
            resume="allow",
            dir=str(workdir),
            config=to_plain(config),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb_id(workdir: Path) -> str:
    """Random: the names of folders, such as seed0, come again in other experiments."""
    path = workdir / "wandb_id"
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def make_writers(workdir: Path, config: ExperimentConfig, start_step: int) -> list[Writer]:
    """The sinks that the config asks for; a resumed run continues their files."""
    path = workdir / "metrics.jsonl"
    truncate_json_lines(path, start_step)
    writers: list[Writer] = [JsonLines(path)]
    if config.logging.tensorboard:
        writers.append(TensorBoard(workdir / "tensorboard", start_step))
    if config.logging.wandb_project:
        writers.append(WeightsAndBiases(config.logging.wandb_project, workdir, config))
    return writers


class Progress:
    """One line for a person: rewritten in place on a terminal, printed now and then otherwise."""

    def __init__(self, total_steps: int, *, stream: Any = None, seconds_between_lines: float = 5.0):
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._in_place = self._stream.isatty()
        self._pause = seconds_between_lines
        self._last = -math.inf
        self._width = 0

    def show(self, step: int, values: Mapping[str, float], *, eta_seconds: float) -> None:
        now = time.monotonic()
        if not self._in_place and now - self._last < self._pause and step < self._total:
            return
        self._last = now
        line = progress_line(step, self._total, values, eta_seconds)
        if self._in_place:
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def end(self) -> None:
        """Ends a line that is rewritten in place, so that what follows starts on its own."""
        if self._in_place and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0


def progress_line(
    step: int, total_steps: int, values: Mapping[str, float], eta_seconds: float
) -> str:
    """Step, loss, both directions, excess, effective positives, speed, devices, data wait, ETA."""
    parts = [f"step {step:>{len(str(total_steps))}}/{total_steps}"]
    for name, label, form in _SHOWN:
        if name in values:
            parts.append(f"{label} {values[name]:{form}}")
    parts.append(f"eta {duration(eta_seconds)}")
    return "  ".join(parts)


_SHOWN = (
    ("loss", "loss", ".3f"),
    ("loss_u_to_v", "u>v", ".3f"),
    ("loss_v_to_u", "v>u", ".3f"),
    ("excess", "excess", ".3f"),
    ("effective_positives", "eff.pos", ".1f"),
    ("accuracy_u_to_v", "acc", ".2f"),
    ("examples_per_second", "pairs/s", ".0f"),
    ("seconds_per_step", "s/step", ".3g"),
    ("mfu", "MFU", ".1%"),
    ("memory_gb", "GB", ".1f"),
    ("data_wait", "wait", ".0%"),
)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
